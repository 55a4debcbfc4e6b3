"""One folder per task: its texts in `__init__`, its functions in the files beside; `registry` lists the tasks."""
