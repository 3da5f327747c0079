// Show the guide one step at a time, mark the step's control, and remember how far the visitor came.
const KEY = 'quantscope-guide';
const USES = ['pointerdown', 'keydown'];
const root = element.querySelector('.qs-guide');
const steps = [...root.querySelectorAll('li')];
const said = root.querySelector('.qs-said');
let now = -1;
let marked = null;
let watching = null;
let used = false;

function kept(state) {
  try {
    if (state !== undefined) localStorage.setItem(KEY, state);
    return localStorage.getItem(KEY);
  } catch { return null; }
}

const visible = (list) => list.split(',').flatMap((one) => [...document.querySelectorAll(one)]).find((found) => found.offsetParent);

// Call `use` with the element as soon as the page shows it: a tab is made when it is opened.
function whenVisible(list, use, step, tries = 40) {
  const found = visible(list);
  if (now !== step) return;
  if (found) use(found);
  else if (tries) setTimeout(() => whenVisible(list, use, step, tries - 1), 150);
}

function unmark() {
  marked?.classList.remove('qs-pointed');
  marked?.removeAttribute('aria-describedby');
  for (const event of USES) marked?.removeEventListener(event, note, true);
  marked = null;
  used = false;
  watching?.disconnect();
}

function note(event) {
  used ||= event.key !== 'Tab';
}

function mark(control) {
  marked = control;
  control.classList.add('qs-pointed');
  control.setAttribute('aria-describedby', `guide-do-${now}`);
  for (const event of USES) control.addEventListener(event, note, true);
  const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
  control.scrollIntoView({ block: 'center', behavior: calm ? 'auto' : 'smooth' });
}

// The step is done when what is to be seen changes after the control was used; opening the tab changes it too.
function follow(seen) {
  const before = seen.innerText;
  watching = new MutationObserver(() => {
    if (!used || seen.innerText === before || !seen.innerText.trim()) return;
    watching.disconnect();
    steps[now].classList.add('qs-done');
    said.textContent = steps[now].querySelector('.qs-see').textContent;
  });
  watching.observe(seen, { childList: true, subtree: true, characterData: true });
}

// Show "offer", "ended" or a step by its number; `moved`: the visitor asked for it, so its tab is opened and its title focused.
function show(state, moved) {
  unmark();
  now = /^\d$/.test(state) && steps[state] ? Number(state) : -1;
  const kind = now >= 0 ? 'step' : state === 'ended' ? 'ended' : 'offer';
  root.dataset.state = kind;
  for (const part of root.querySelectorAll('[data-when]')) part.hidden = part.dataset.when !== kind;
  steps.forEach((step, place) => { step.hidden = place !== now; });
  if (moved) kept(state);
  if (now < 0) {
    if (moved) root.querySelector(`[data-when=${kind}] button`)?.focus();
    return;
  }
  const step = steps[now];
  root.querySelector('[data-go=back]').disabled = now === 0;
  root.querySelector('[data-go=next]').hidden = now === steps.length - 1;
  if (moved) {
    const tabs = [...document.querySelectorAll('#tabs button[role=tab]')].filter((tab) => tab.offsetParent);
    if (step.dataset.tab) tabs[step.dataset.tab]?.click();
    step.querySelector('h2').focus({ preventScroll: true });
  }
  whenVisible(step.dataset.control, mark, now);
  whenVisible(step.dataset.seen, follow, now);
}

const ACTS = {
  start: () => show('0', true),
  back: () => show(String(now - 1), true),
  next: () => show(String(now + 1), true),
  end: () => show('ended', true),
  control: () => {
    if (!marked) return;
    if (marked.matches('button, input, [tabindex]')) marked.focus();
    else marked.querySelector('input, button, [tabindex="0"]')?.focus();
  },
};
root.addEventListener('click', (event) => ACTS[event.target.closest('[data-go]')?.dataset.go]?.());
root.addEventListener('keydown', (event) => { if (event.key === 'Escape' && now >= 0) ACTS.end(); });
show(kept() ?? 'offer', false);
