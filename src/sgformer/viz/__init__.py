"""Pictures drawn from arrays; nothing here depends on a model."""
