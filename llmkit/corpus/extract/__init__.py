"""Web archives and pages to documents.

archives.py reads records, page_metadata.py what a page declares about itself, engines.py and blocks.py extract
its text, and extractor.py runs an engine over pages in worker processes.
"""
