"""One function a workflow rule: files in, one evidence file out. The command line calls them."""
