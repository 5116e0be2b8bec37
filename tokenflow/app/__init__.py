"""`tokenflow app`: a page in the browser to edit in, on Gradio."""
