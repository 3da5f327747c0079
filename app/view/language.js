// Translate the page in the browser: its texts are looked up in a catalogue of phrases.
const { phrases, paragraphs } = __WORDS__;
const KEY = 'quantscope-language';
const ATTRIBUTES = ['aria-label', 'aria-roledescription', 'title', 'placeholder'];
// What people and models write is left alone, and charts translate their figures before they draw them.
const FOREIGN = 'script, style, code, pre, textarea, .qs-token, .qs-stream p, .qs-chart, [translate=no]';
const RICH = '.prose p, .qs-rich';  // translated as a whole, with its markup
const NUMBERS = String.raw`(?:[\d.,−+·⁰¹²³⁴⁵⁶⁷⁸⁹×≈±∞–…\s-]|%\{[^}]*\}|\b(?:and|undefined|[kMGT]?B|min|s)\b)+?`;
const NUMBER = new RegExp(`^${NUMBERS}$`);
const squeeze = (text) => text.trim().replace(/\s+/g, ' ');

// ---- one text ----

const exact = new Map();
const patterns = [];
for (const [english, chinese] of Object.entries(phrases)) {
  const [first, ...rest] = english.split(/\{(\w+[#@]?)\}/);
  if (!rest.length) { exact.set(squeeze(english), chinese); continue; }
  const literal = (text) => text.replace(/\s+/g, ' ').replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
  const names = rest.filter((_, at) => at % 2 === 0);
  const source = rest.map((part, at) => (at % 2 ? literal(part) : part.endsWith('#') ? `(${NUMBERS})` : part.endsWith('@') ? '(\\D+?)' : '(.+?)')).join('');
  const test = new RegExp(`^${(literal(first) + source).trim()}$`);
  patterns.push({ test, names, chinese, weight: english.length, spans: english.includes(' · ') });
}
patterns.sort((a, b) => b.weight - a.weight);

const known = new Map();
function look(text) {
  if (!known.has(text)) known.set(text, exact.get(text) ?? tagged(text) ?? filled(text) ?? joined(text) ?? labelled(text) ?? sentences(text) ?? listed(text));
  return known.get(text);
}
const say = (text) => look(squeeze(text)) ?? (NUMBER.test(text) ? text.replaceAll(' and ', ' 和 ') : text);

function tagged(text) {
  if (!/<[^>]+>/.test(text)) return null;
  const pieces = text.split(/(<[^>]+>)/);
  const done = pieces.map((piece) => (piece[0] === '<' || !piece.trim() ? null : look(squeeze(piece))));
  return done.some(Boolean) ? pieces.map((piece, at) => (done[at] ? piece.replace(piece.trim(), () => done[at]) : piece)).join('') : null;
}

function filled(text) {
  const cut = text.includes(' · ');
  for (const { test, names, chinese, spans } of patterns) {
    const match = cut && !spans ? null : test.exec(text);
    if (!match) continue;
    const values = Object.fromEntries(names.map((name, at) => [name.replace(/[#@]/, ''), say(match[at + 1])]));
    return chinese.trim().replace(/\{(\w+)\}/g, (_, name) => values[name]);
  }
  return null;
}

function joined(text) {
  const parts = text.split(/ ?· /);
  if (parts.length < 2) return null;
  const done = parts.map((part) => part.trim() && look(squeeze(part)));
  return done.some(Boolean) ? parts.map((part, at) => done[at] || part).join(' · ') : null;
}

function labelled(text) {
  const at = text.indexOf(': ');
  const label = at > 0 && (exact.get(text.slice(0, at)) ?? filled(text.slice(0, at)));
  return label ? `${label}：${say(text.slice(at + 2))}` : null;
}

function sentences(text) {
  const parts = text.split(/(?<=[.!?:]) /);
  if (parts.length < 2 || parts.length > 24) return null;
  const done = [];
  let found = false;
  for (let at = 0; at < parts.length;) {
    let end = parts.length - (at === 0 ? 1 : 0);  // the whole text was looked up already
    let said = null;
    for (; end > at && !said; end -= 1) {
      const piece = parts.slice(at, end).join(' ');
      said = exact.get(piece) ?? filled(piece);
    }
    found ||= said !== null;
    done.push(said ?? `${parts[at]} `);
    at = said ? end + 1 : at + 1;
  }
  return found ? done.join('').trim() : null;
}

function listed(text) {
  for (const [separator, mark] of [[', ', '，'], [' and ', '和']]) {
    const parts = text.split(separator);
    if (parts.length < 2) continue;
    const done = parts.map((part) => look(squeeze(part)) ?? (NUMBER.test(part) ? part : null));
    if (done.every(Boolean) && done.some((part, at) => part !== parts[at])) return done.join(mark);
  }
  return null;
}

// ---- the page ----

const before = new WeakMap();  // what stood in a node, attribute or field, and what was put there instead

function put(owner, name, now, set, chinese) {
  const kept = before.get(owner) ?? {};
  if (chinese === undefined) {
    if (kept[name] && kept[name].chinese === now) set(kept[name].english);
    return;
  }
  if (kept[name]?.chinese === now) return;
  const said = chinese ?? (now && /[A-Za-z]/.test(now) ? look(squeeze(now)) : null);
  if (!said) return;
  const text = chinese ?? now.replace(now.trim(), () => said);
  kept[name] = { english: now, chinese: text };
  before.set(owner, kept);
  set(text);
}

// `to`: null to translate, undefined to restore.
function turn(node, to) {
  if (node.nodeType === Node.TEXT_NODE) {
    if (!node.parentElement?.matches('.qs-reading .qs-tok')) put(node, 'data', node.data, (text) => { node.data = text; }, to);
    return;
  }
  if (node.nodeType !== Node.ELEMENT_NODE) return;
  for (const name of ATTRIBUTES) {
    if (node.hasAttribute(name)) put(node, name, node.getAttribute(name), (text) => node.setAttribute(name, text), to);
  }
  if (node.matches(FOREIGN)) return;
  if (node.matches('.wrap-inner input')) put(node, 'value', node.value, (text) => { node.value = text; }, to);
  if (node.matches(RICH)) {
    const own = to === null ? paragraphs[squeeze(node.textContent)] : undefined;
    if (to === undefined || own) put(node, 'html', node.innerHTML, (html) => { node.innerHTML = html; }, own);
  }
  for (const child of node.childNodes) turn(child, to);
}

const observer = new MutationObserver((changes) => {
  for (const change of changes) {
    const place = change.target.nodeType === Node.TEXT_NODE ? change.target.parentElement : change.target;
    if (!place?.isConnected || place.closest(FOREIGN)) continue;
    const whole = change.type !== 'attributes' && place.closest(RICH);
    if (whole) turn(whole, null);
    else if (change.type === 'childList') change.addedNodes.forEach((node) => turn(node, null));
    else if (change.type === 'characterData') turn(change.target, null);
    else put(place, change.attributeName, place.getAttribute(change.attributeName), (text) => place.setAttribute(change.attributeName, text), null);
  }
  for (const field of document.querySelectorAll('.wrap-inner input')) turn(field, null);
});

function speak(language) {
  const chinese = language === 'zh';
  window.quantscopeSay = chinese ? say : null;
  observer.disconnect();
  turn(document.body, chinese ? null : undefined);
  if (chinese) observer.observe(document.body, { childList: true, subtree: true, characterData: true, attributes: true, attributeFilter: ATTRIBUTES });
  document.documentElement.lang = chinese ? 'zh-CN' : 'en';  // charts draw themselves anew
  for (const button of element.querySelectorAll('button')) button.setAttribute('aria-pressed', String(button.dataset.language === language));
}

function kept(language) {
  try {
    if (language) localStorage.setItem(KEY, language);
    return localStorage.getItem(KEY);
  } catch { return null; }
}

element.addEventListener('click', (event) => {
  const language = event.target.closest('[data-language]')?.dataset.language;
  if (language) speak(kept(language) ?? language);
});
speak(kept() ?? (navigator.language.toLowerCase().startsWith('zh') ? 'zh' : 'en'));
