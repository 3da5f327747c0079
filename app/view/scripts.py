"""Scripts of the page's events: tabs, the side, and what the browser remembers."""

from __future__ import annotations

from app.view import texts

CLOSE_JS = """
  const side = document.querySelector('#side');
  if (window.innerWidth < 768 && side?.classList.contains('open')) side.querySelector('.toggle-button')?.click();
"""
"""Script that hides the side after use on a phone, where it covers the page."""
RESTART_MS = 4000
"""Time to read that a visit has ended, before the page starts anew."""
START_JS = f"""() => {{
  const toggle = document.querySelector('#side .toggle-button');
  toggle?.setAttribute('aria-label', '{texts.SIDE}');
  toggle?.setAttribute('title', '{texts.SIDE}');
  const watch = () => {{
    const status = document.querySelector('#status');
    if (!status) return setTimeout(watch, 200);
    new MutationObserver(() => {{
      if (!status.querySelector('[data-restart]')) return;
      try {{ sessionStorage.removeItem('quantscope'); }} catch {{}}
      setTimeout(() => location.reload(), {RESTART_MS});
    }}).observe(status, {{ childList: true, subtree: true }});
  }};
  watch();
  {CLOSE_JS}
}}"""
TAB_JS = """() => {
  [...document.querySelectorAll('#tabs button[role=tab]')].filter((tab) => tab.offsetParent)[%d]?.click();
  window.scrollTo({ top: 0 });
  %s
}"""
TOP_JS = "() => window.scrollTo({ top: 0 })"
OPEN_TAB_JS = """(name) => {
  const tabs = [...document.querySelectorAll('#tabs button[role=tab]')].filter((tab) => tab.offsetParent);
  const place = %s.indexOf(name);
  if (place > 0) tabs[place]?.click();
}"""
REMEMBERED_JS = "() => { try { return sessionStorage.getItem('quantscope'); } catch { return null; } }"
REMEMBER_JS = "(key) => { try { sessionStorage.setItem('quantscope', key); } catch {} }"
"""Script that keeps the session's key for a reload of its browser tab; where the browser stores nothing, a reload starts anew."""
