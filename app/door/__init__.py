"""The door: limits on connections and requests, and who may ask for what, before Gradio sees a request."""
