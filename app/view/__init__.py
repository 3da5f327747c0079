"""The contents of the page: texts, HTML, tables, charts."""
