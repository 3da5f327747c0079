// Draw props.value, a figure as JSON, with plotly; colour tokens ("@ink") become the theme's colours.
// Keep one reference to plotly: another bundle on the page may overwrite window.Plotly later.
const Plotly = window.Plotly;
const THEMES = __THEMES__;
const host = element.querySelector('.qs-chart');
const said = element.querySelector('.qs-said');
const NUMBERS = { f4: Float32Array, i4: Int32Array };
const CONFIG = {
  responsive: false, displaylogo: false, showSendToCloud: false, scrollZoom: false,
  modeBarButtonsToRemove: ['lasso2d', 'select2d', 'autoScale2d'], doubleClick: 'reset',
  toImageButtonOptions: { format: 'svg', filename: 'quantscope' },
};
const isDark = () => document.body.classList.contains('dark');
const isNarrow = () => host.clientWidth < 460;

// ---- make a figure of the value ----

function ordered(theme, share) {
  const scale = theme.ordered;
  let i = 1;
  while (i < scale.length - 1 && scale[i][0] < share) i += 1;
  const [a, from] = scale[i - 1];
  const [b, to] = scale[i];
  const t = Math.min(1, Math.max(0, (share - a) / (b - a)));
  const mix = (k) => Math.round(parseInt(from.slice(k, k + 2), 16) * (1 - t) + parseInt(to.slice(k, k + 2), 16) * t);
  return `rgb(${mix(1)},${mix(3)},${mix(5)})`;
}

function numbers(packed) {
  const bytes = Uint8Array.from(atob(packed.bdata), (letter) => letter.charCodeAt(0));
  const flat = new NUMBERS[packed.dtype](bytes.buffer);
  if (!packed.shape) return flat;
  const columns = Number(packed.shape.split(',')[1]);
  return Array.from({ length: flat.length / columns }, (_, row) => flat.subarray(row * columns, (row + 1) * columns));
}

function reader(theme) {
  const known = new Map();  // hundreds of bars share a few colours
  const colour = (token) => (token.startsWith('ordered:') ? ordered(theme, parseFloat(token.slice(8))) : theme[token]);
  return (key, value) => {
    if (value && value.bdata !== undefined) return numbers(value);
    if (typeof value !== 'string' || value[0] !== '@') return value;
    if (!known.has(value)) known.set(value, colour(value.slice(1)) ?? value);
    return known.get(value);
  };
}

// Write the texts of a figure in the language of the page.
function worded({ data, layout }) {
  const say = window.quantscopeSay;
  if (!say) return;
  const all = (value) => (typeof value === 'string' ? say(value) : Array.isArray(value) ? value.map(all) : value);
  const titled = (part) => { if (part?.title?.text) part.title.text = say(part.title.text); };
  for (const trace of data) {
    for (const key of ['name', 'hovertemplate', 'text', 'x', 'y']) if (key in trace) trace[key] = all(trace[key]);
    titled(trace.colorbar);
    titled(trace.marker?.colorbar);
  }
  [layout, ...Object.values(layout)].forEach(titled);
  for (const note of layout.annotations) note.text = say(note.text);
}

function template(theme, family) {
  const axis = { gridcolor: theme.grid, linecolor: theme.faint, zerolinecolor: theme.faint, zerolinewidth: 1, tickcolor: theme.faint,
                 ticks: '', automargin: true, title: { font: { size: 12, color: theme.muted }, standoff: 6 }, tickfont: { size: 11, color: theme.muted } };
  return { layout: {
    font: { family, size: 12, color: theme.ink }, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    xaxis: axis, yaxis: { ...axis, ticklabelstandoff: 5 },
    hoverlabel: { bgcolor: theme.panel, bordercolor: theme.faint, font: { color: theme.ink, family, size: 12 }, align: 'left', namelength: -1 },
    modebar: { bgcolor: 'rgba(0,0,0,0)', color: theme.faint, activecolor: theme.ink },
    coloraxis: { colorbar: { tickfont: { size: 11 } } },
  } };
}

// ---- captions break into lines, legends get rows of their own ----

const ruler = document.createElement('canvas').getContext('2d');

function lines(text, size, family, width) {
  ruler.font = `${size}px ${family}`;
  const rows = [''];
  for (const word of text.split(' ')) {
    const longer = `${rows[rows.length - 1]} ${word}`.trim();
    if (rows[rows.length - 1] && ruler.measureText(longer).width > width) rows.push(word);
    else rows[rows.length - 1] = longer;
  }
  return rows;
}

function legendRows(figure, family, width) {
  ruler.font = `11px ${family}`;
  const named = figure.data.filter((trace) => trace.showlegend !== false && trace.visible !== false && trace.name);
  const widest = Math.max(0, ...named.map((trace) => Math.max(...trace.name.split('<br>').map((line) => ruler.measureText(line).width)))) + 48;
  return named.length ? Math.ceil(named.length / Math.max(1, Math.floor(width / widest))) : 0;  // plotly sets them in columns
}

function arrange(figure, family) {
  const { layout } = figure;
  const margin = { ...layout.margin };
  const width = host.clientWidth;
  if (isNarrow()) {
    Object.assign(margin, { l: Math.min(margin.l, 46), r: Math.min(margin.r, 8) });
    for (const trace of figure.data) {
      const bar = trace.colorbar || (trace.marker && trace.marker.colorbar);
      if (bar) Object.assign(bar, { title: undefined, thickness: 6 });
    }
  }
  ruler.font = `11px ${family}`;
  const wide = width - margin.l - margin.r;
  const high = (host.clientHeight || 320) - margin.t - margin.b;
  for (const [name, axis] of Object.entries(layout)) {
    const [from, to] = axis?.domain ?? [0, 1];
    if (name.startsWith('xaxis')) thin(axis, wide * (to - from), (text) => ruler.measureText(text).width + 8);
    if (name.startsWith('yaxis')) thin(axis, high * (to - from), () => 11);
  }
  let top = 0;
  if (layout.title) {
    const rows = lines(layout.title.text, layout.title.font.size, family, width - 20);
    layout.title.text = rows.join('<br>');
    if (rows.length > 1) layout.title.pad = { ...layout.title.pad, t: 15 };  // plotly lifts a title of several lines
    top = (rows.length - 1) * 20;
  }
  for (const words of layout.annotations) {
    if (words.name !== 'caption') continue;
    const rows = lines(words.text, words.font.size, family, width - margin.l - margin.r);
    words.text = rows.join('<br>');
  }
  const legend = layout.legend;
  if (layout.showlegend && legend && legend.yref === 'container') {
    const rows = legendRows(figure, family, width - 20) * 19;
    if (legend.yanchor === 'top') {
      legend.y = 1 - (30 + top) / (host.clientHeight || 320);
      top += rows;
    } else margin.b += rows;
  }
  layout.margin = { ...margin, t: margin.t + top };
}

// Place named marks on an axis, leaving out those that would touch the one before.
function thin(axis, pixels, size) {
  if (!axis || !axis.tickvals || !axis.range) return;
  const unit = pixels / Math.abs(axis.range[1] - axis.range[0]);
  let last = -Infinity;
  const kept = axis.tickvals.map((value, i) => i).filter((i) => {
    const far = (axis.tickvals[i] - last) * unit >= size(axis.ticktext[i]);
    if (far) last = axis.tickvals[i];
    return far;
  });
  axis.tickvals = kept.map((i) => axis.tickvals[i]);
  axis.ticktext = kept.map((i) => axis.ticktext[i]);
}

// ---- drawing: one chart at a time, each painted before the next; charts of one answer in their order ----

const turns = (window.quantscopeTurns ??= { waiting: new Map(), busy: false });
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const frame = () => Promise.race([new Promise((done) => requestAnimationFrame(() => setTimeout(done))), pause(200)]);

async function takeTurns() {
  turns.busy = true;
  await pause(0);  // so that the other charts of the same answer are queued
  while (turns.waiting.size) {
    const round = [...turns.waiting].sort(([a], [b]) => a.dataset.turn - b.dataset.turn);
    for (const [chart, drawNow] of round) {
      turns.waiting.delete(chart);
      try { await drawNow(); } catch (error) { console.error('chart', error); }
      await frame();
    }
  }
  turns.busy = false;
}

// Draw only the newest value: a dragged slider must not queue up work.
function draw() {
  turns.waiting.set(host, drawNow);
  if (!turns.busy) takeTurns();
}

async function drawNow() {
  if (!props.value || !host.isConnected || host.clientWidth === 0) return;
  const theme = isDark() ? THEMES.dark : THEMES.light;
  const family = getComputedStyle(element).fontFamily;
  const figure = JSON.parse(props.value, reader(theme));
  worded(figure);
  Object.assign(figure.layout, { template: template(theme, family), autosize: true, height: host.clientHeight || 320, width: host.clientWidth });
  arrange(figure, family);
  await Plotly.react(host, figure.data, figure.layout, { ...CONFIG, displayModeBar: isNarrow() ? false : 'hover' });
  host.dataset.drawn = String(Number(host.dataset.drawn || 0) + 1);
  for (const button of host.querySelectorAll('.modebar-btn')) button.tabIndex = -1;  // the arrow keys replace them
  curves = null;
  bind();
}

let bound = false;
function bind() {
  if (bound || !host.on) return;
  bound = true;
  host.on('plotly_click', (event) => select(event.points && event.points[0]));
}

function select(point) {
  if (!point) return;
  const custom = point.customdata == null ? null : Array.from([].concat(ArrayBuffer.isView(point.customdata) ? Array.from(point.customdata) : point.customdata));
  trigger('select', { x: point.x, y: point.y, curve: point.curveNumber, custom });
}

// ---- the keyboard: left and right along a curve or row, up and down to the next one, Enter chooses ----

let curves = null;
let place = { curve: 0, at: -1 };
let shown = null;

function walks() {
  const found = [];
  host.data.forEach((trace, curve) => {
    if (trace.hoverinfo === 'skip' || trace.visible === false) return;
    if (trace.type === 'heatmap') {
      trace.z.forEach((row, y) => {
        const points = Array.from(row, (value, x) => ({ index: [y, x], key: x, empty: value == null })).filter((point) => !point.empty);
        if (points.length) found.push({ curve, points });
      });
      return;
    }
    const along = trace.orientation === 'h' ? trace.y : trace.x;
    const points = Array.from(along || [], (value, index) => ({ index, key: typeof value === 'number' ? value : index }));
    if (points.length) found.push({ curve, points: points.sort((a, b) => a.key - b.key) });
  });
  const [bottom, top] = host.layout.yaxis?.range || [0, 1];
  if (host.data[0]?.type === 'heatmap' && bottom < top) found.reverse();  // the first row to walk is the topmost one
  return found;
}

function walk(along, across) {
  curves ??= walks();
  if (!curves.length) return;
  const curve = Math.min(curves.length - 1, Math.max(0, place.curve + across));
  const points = curves[curve].points;
  let at = place.at + along;
  if (curve !== place.curve) {
    const key = curves[place.curve]?.points[place.at]?.key ?? 0;
    at = points.reduce((best, point, i) => (Math.abs(point.key - key) < Math.abs(points[best].key - key) ? i : best), 0);
  }
  place = { curve, at: Math.min(points.length - 1, Math.max(0, at)) };
  const { curve: curveNumber } = curves[curve];
  const { index } = points[place.at];
  const trace = host.data[curveNumber];
  const cell = Array.isArray(index);
  const x = !cell ? trace.x[index] : trace.x ? trace.x[index[1]] : trace.x0 + index[1] * trace.dx;
  const y = cell ? index[0] : trace.y[index];
  shown = { curveNumber, x, y, customdata: cell ? trace.customdata?.[index[0]]?.[index[1]] : trace.customdata?.[index] };
  if (cell) frameCell(trace, x, y);
  // heat maps and WebGL are found by place only
  const point = cell || trace.type === 'scattergl' ? { curveNumber, xval: x, yval: y } : { curveNumber, pointNumber: index };
  Plotly.Fx.hover(host, [point], `${trace.xaxis || 'x'}${trace.yaxis || 'y'}`);
  setTimeout(say, 80);  // plotly shows a point within 50 ms of the one before
}

// Frame the cell of a heat map that the keys have reached: dark on light, so that it is seen on every colour; no trace: no frame.
function frameCell(trace, x, row) {
  const theme = isDark() ? THEMES.dark : THEMES.light;
  const shapes = (host.layout.shapes || []).filter((shape) => shape.name !== 'cursor');
  const half = trace && (trace.dx || 1) / 2;
  for (const [color, width] of trace ? [[theme.panel, 5], [theme.ink, 2]] : []) {
    const refs = { xref: trace.xaxis || 'x', yref: trace.yaxis || 'y' };
    shapes.push({ name: 'cursor', type: 'rect', ...refs, x0: x - half, x1: x + half, y0: row - 0.5, y1: row + 0.5, line: { color, width } });
  }
  Plotly.relayout(host, { shapes });
}

function say() {
  const texts = [...host.querySelectorAll('.hoverlayer .hovertext text')];
  said.textContent = texts.map((text) => {
    const rows = [...text.querySelectorAll('tspan.line')];
    return (rows.length ? rows : [text]).map((row) => row.textContent).join(', ');
  }).join('; ');
}

const KEYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-Infinity, 0], End: [Infinity, 0] };

host.addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || !host.data) return;
  if (event.key in KEYS) walk(...KEYS[event.key]);
  else if (event.key === 'Enter' && shown) select(shown);
  else if (event.key === 'Escape') Plotly.Fx.unhover(host);
  else return;
  event.preventDefault();
});
host.addEventListener('blur', () => {
  if (!host.data) return;
  Plotly.Fx.unhover(host);
  if ((host.layout.shapes || []).some((shape) => shape.name === 'cursor')) frameCell(null);
});

if (!Plotly) {
  host.textContent = 'The chart library could not be loaded. Reload the page.';
} else {
  watch('value', draw);
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ['class'] });
  new MutationObserver(draw).observe(document.documentElement, { attributes: true, attributeFilter: ['lang'] });
  let width = 0;
  let height = 0;
  new ResizeObserver(() => {
    if (host.clientWidth === width && host.clientHeight === height) return;
    width = host.clientWidth;
    height = host.clientHeight;
    draw();
  }).observe(host);
  draw();
}
