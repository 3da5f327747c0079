"""One class per tab: it makes its widgets when created, `wire` connects them, and its methods are their handlers."""
