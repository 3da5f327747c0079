"""Call the handlers of the page's events, and write the answers that its script expects.

For each answer Gradio makes all outputs of an event anew, and for each page it keeps a copy of every component: that costs many
times what the handlers do. None of it is needed here: handlers check the values that they are given, and what a page shows is
decided by `app.session`.
"""

from __future__ import annotations

import asyncio
import gzip
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import gradio as gr
from starlette.requests import Request

from app.context import UNCHANGED
from app.view.chart import Chart

PACKED_BYTES = 4096
"""Length from which an answer is compressed."""


@dataclass(frozen=True)
class Call:
    """One event of the page.

    Attributes:
        handler: called with one dict of values by component if `named`, else with one value per input, and then with `extra`.
        inputs, outputs: components. extra: types of what the handler also asks for, `gr.Request` and `gr.EventData`.
        closes: whether the event is the closing of a page.
    """

    handler: Callable[..., Any]
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    named: bool
    extra: tuple[type, ...]
    closes: bool = False

    @classmethod
    def of(cls, event: Any) -> Call:
        """Read an event of Gradio's table `Blocks.fns`."""
        kinds = get_type_hints(event.fn).values()
        return cls(
            event.fn,
            tuple(event.inputs),
            tuple(event.outputs),
            event.inputs_as_dict,
            tuple(kind for kind in kinds if kind in (gr.Request, gr.EventData)),
            any(what == "unload" for _, what in event.targets),
        )

    async def answer(self, event: Mapping[str, Any], scope: Any, *, packed: bool = False) -> bytes:
        """Write the answer to a checked event: what its handler returns.

        Returns: JSON that holds for each output its new value, or the properties that change; by gzip if `packed` and it is long.
        """
        values = [_taken(block, value) for block, value in zip(self.inputs, event["data"], strict=True)]
        request = gr.Request(Request(scope), session_hash=event["session_hash"])
        found = {gr.Request: request, gr.EventData: gr.EventData(None, event.get("event_data"))}
        arguments = [dict(zip(self.inputs, values, strict=True))] if self.named else values
        arguments += [found[kind] for kind in self.extra]
        if inspect.iscoroutinefunction(self.handler):
            return await asyncio.to_thread(self._encode, await self.handler(*arguments), packed)
        return await asyncio.to_thread(lambda: self._encode(self.handler(*arguments), packed))

    def _encode(self, made: Any, packed: bool) -> bytes:
        """Encode what the handler returned: a dict by component, or the value of its only output."""
        updates = made
        if not isinstance(made, dict) or all(isinstance(key, str) for key in made):
            updates = {self.outputs[0]: made} if self.outputs else {}
        if not updates.keys() <= set(self.outputs):
            raise ValueError("a handler changes a component that is not among its event's outputs")
        data = [_written(block, updates[block]) if block in updates else UNCHANGED for block in self.outputs]
        body = json.dumps({"data": data, "is_generating": False}, separators=(",", ":")).encode()
        return gzip.compress(body, 1) if packed and len(body) >= PACKED_BYTES else body


def calls_of(events: Mapping[int, Any]) -> dict[int, Call]:
    """Read Gradio's table `Blocks.fns`. Events without a handler, and those that would wait in Gradio's queue, are left out."""
    calls = {index: Call.of(event) for index, event in events.items() if event.fn is not None}
    return {index: call for index, call in calls.items() if call.closes or not events[index].queue}


def _taken(block: Any, value: Any) -> Any:
    """Return an input's value as handlers take it: an uploaded file as its path, anything else as it was sent."""
    return value["path"] if isinstance(block, gr.UploadButton) and value is not None else value


def _written(block: Any, value: Any) -> Any:
    """Return an output's value or update as the page's script reads it."""
    if not (isinstance(value, dict) and value.get("__type__") == "update"):
        return _value(block, value)
    found = {name: new for name, new in value.items() if new is not None or name == "value"}
    if "value" in found:
        found["value"] = _value(block, found["value"])
    if "choices" in found:
        found["choices"] = [choice if isinstance(choice, tuple) else (str(choice), choice) for choice in found["choices"]]
    return found


def _value(block: Any, value: Any) -> Any:
    if isinstance(block, Chart):
        return block.postprocess(value)
    if isinstance(block, gr.DownloadButton) and value is not None:
        return gr.FileData(path=value, url=f"/gradio_api/file={value}", orig_name=Path(value).name).model_dump()
    return value
