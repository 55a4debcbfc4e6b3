"""Training runs: settings, trainer, callbacks, run folder and report."""
