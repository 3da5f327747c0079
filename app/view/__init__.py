"""What the page shows: words, HTML, tables, charts."""
