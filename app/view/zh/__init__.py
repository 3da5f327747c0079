"""The texts of the page in Chinese, in modules, names and shapes like those of `app.view.texts*`."""
