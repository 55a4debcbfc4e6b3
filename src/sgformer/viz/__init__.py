"""Pictures, drawn from arrays; nothing here knows a model."""
