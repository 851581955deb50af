"""`pemt report`: what runs did, as one page that needs no network, and as Markdown."""
