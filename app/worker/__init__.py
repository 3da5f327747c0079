"""The worker process and how the page talks to it."""
