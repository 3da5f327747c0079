"""Start the page: `python -m app [--host --port --model]`."""

from app.main import launch

if __name__ == "__main__":
    launch()
