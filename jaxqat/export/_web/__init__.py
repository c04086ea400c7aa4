"""A static web page that runs an exported network in the browser, by onnxruntime-web."""
