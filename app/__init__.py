"""The page: texts, widgets and events. It imports only `core` and computes nothing heavy itself."""
