"""One file a task: backbone, head, loss and metric as a Lightning module."""
