"""Words of the choice of baselines, on the tab Compare."""

PANEL = "Baselines of other libraries"
CHOICE = "Add to the comparison"
INFO = "Each is made of the opened model by the library itself. Measure puts it beside your runs: same text, bytes counted alike."
MISSING = "Not installed here: {names}. Run {command} to add them."
NONE_OPEN = "No model is open yet: open one, then add its baselines."
"""Of the error where there is nothing to make a baseline of."""
