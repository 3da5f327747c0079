"""One file per tab: `build(...)` makes its widgets, `wire(...)` connects them."""
