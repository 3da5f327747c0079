"""The page's look: Gradio's theme in greys, and the stylesheet with the charts' colours as variables."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from app.view.figure import THEMES

CSS = Path(__file__).parent / "page.css"


def theme() -> gr.themes.Base:
    """Make Gradio's theme in greys; colour is only for data."""
    base = gr.themes.Default(
        primary_hue=gr.themes.colors.slate,
        secondary_hue=gr.themes.colors.slate,
        neutral_hue=gr.themes.colors.slate,
        spacing_size=gr.themes.sizes.spacing_sm,
        font=["ui-sans-serif", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "SF Mono", "Consolas", "Liberation Mono", "monospace"],
        radius_size=gr.themes.sizes.radius_sm,
        text_size=gr.themes.sizes.text_sm,
    )
    return base.set(
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#0e1217",
        block_background_fill="#ffffff",
        block_background_fill_dark="#161b22",
        background_fill_secondary_dark="#12171d",
        background_fill_primary_dark="#161b22",
        border_color_primary_dark="#2a323d",
        block_border_width="0px",
        block_shadow="none",
        input_background_fill_dark="#1d232b",
        input_border_color_dark="#343d49",
        button_primary_background_fill="*neutral_800",
        button_primary_background_fill_hover="*neutral_700",
        button_primary_background_fill_dark="#e8ecf2",
        button_primary_background_fill_hover_dark="#ffffff",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#12171d",
        button_primary_text_color_hover_dark="#12171d",
        slider_color="*neutral_700",
        slider_color_dark="*neutral_300",
        block_info_text_size="12px",
        block_info_text_color=THEMES["light"]["muted"],
        block_info_text_color_dark=THEMES["dark"]["muted"],
        body_text_color_subdued=THEMES["light"]["muted"],
        body_text_color_subdued_dark=THEMES["dark"]["muted"],
        block_label_text_color=THEMES["light"]["muted"],
        block_label_text_color_dark=THEMES["dark"]["muted"],
        block_title_text_color=THEMES["light"]["muted"],
        block_title_text_color_dark=THEMES["dark"]["muted"],
        block_label_background_fill="transparent",
        block_title_text_weight="600",
    )


def stylesheet() -> str:
    """Return the page's style rules, with the charts' colours as CSS variables."""

    def variables(name: str) -> str:
        return "".join(f"--qs-{key}:{value};" for key, value in THEMES[name].items() if isinstance(value, str))

    return f":root{{{variables('light')}}}.dark{{{variables('dark')}}}" + CSS.read_text(encoding="utf-8")
