"""One class per tab: making one makes its widgets, `wire` connects them, its methods are the handlers."""
