"""A run: settings, trainer, callbacks, folder and report."""
