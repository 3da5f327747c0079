"""Models by name: finding, checking, loading, converting and saving them."""
