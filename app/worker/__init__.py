"""The worker processes, which load and run models, and their communication with the page."""
