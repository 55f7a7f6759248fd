"""Web archives and pages to documents: archives.py reads records, html.py what a page says, engines.py the text in it."""
