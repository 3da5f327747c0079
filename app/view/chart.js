// Draws props.value, a figure as JSON, with plotly. The value's colour tokens ("@ink") are replaced by the theme's.
// One reference to plotly is taken at load: another bundle on the page may overwrite window.Plotly later.
const Plotly = window.Plotly;
const THEMES = __THEMES__;
const host = element.querySelector('.qs-chart');
const CONFIG = {
  responsive: false, displaylogo: false, showSendToCloud: false, scrollZoom: false,
  modeBarButtonsToRemove: ['lasso2d', 'select2d', 'autoScale2d'], doubleClick: 'reset',
  toImageButtonOptions: { format: 'svg', filename: 'quantscope' },
};
const isDark = () => document.body.classList.contains('dark');
const isNarrow = () => host.clientWidth < 460;

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

function resolve(theme) {
  return (key, value) => {
    if (typeof value !== 'string' || value[0] !== '@') return value;
    if (value.startsWith('@ordered:')) return ordered(theme, parseFloat(value.slice(9)));
    return theme[value.slice(1)] ?? value;
  };
}

function template(theme) {
  const style = getComputedStyle(element);
  const axis = { gridcolor: theme.grid, linecolor: theme.faint, zerolinecolor: theme.faint, zerolinewidth: 1, tickcolor: theme.faint,
                 ticks: '', automargin: true, title: { font: { size: 12, color: theme.muted }, standoff: 6 }, tickfont: { size: 11, color: theme.muted } };
  return { layout: {
    font: { family: style.fontFamily, size: 12, color: theme.ink }, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    xaxis: axis, yaxis: axis, colorway: [theme.run1, theme.run2, theme.run3],
    hoverlabel: { bgcolor: theme.panel, bordercolor: theme.faint, font: { color: theme.ink, family: style.fontFamily, size: 12 }, align: 'left' },
    modebar: { bgcolor: 'rgba(0,0,0,0)', color: theme.faint, activecolor: theme.ink },
    coloraxis: { colorbar: { tickfont: { size: 11 } } },
  } };
}

let drawing = Promise.resolve();
let waiting = false;

async function drawNow() {
  waiting = false;
  if (!props.value || !host.isConnected || host.clientWidth === 0) return;
  const theme = isDark() ? THEMES.dark : THEMES.light;
  let figure;
  try { figure = JSON.parse(props.value, resolve(theme)); } catch (error) { console.error('chart', error); return; }
  const layout = figure.layout;
  layout.template = template(theme);
  layout.autosize = true;
  layout.height = host.clientHeight || 320;
  layout.width = host.clientWidth;
  if (isNarrow()) {
    const lower = layout.title && layout.showlegend && (layout.legend || {}).yanchor === 'bottom' ? 18 : 0;
    layout.margin = { ...layout.margin, l: Math.min(layout.margin.l, 46), r: 6, t: layout.margin.t + lower };
    for (const trace of figure.data) {
      const bar = trace.colorbar || (trace.marker && trace.marker.colorbar);
      if (bar) { bar.title = undefined; bar.thickness = 6; }
    }
  }
  await Plotly.react(host, figure.data, layout, { ...CONFIG, displayModeBar: isNarrow() ? false : 'hover' });
  host.dataset.drawn = String(Number(host.dataset.drawn || 0) + 1);
  bind();
}

// One drawing at a time, and only the newest value: a dragged slider must not queue up work.
function draw() {
  if (waiting) return;
  waiting = true;
  drawing = drawing.then(drawNow).catch((error) => console.error('chart', error));
}

let bound = false;
function bind() {
  if (bound || !host.on) return;
  bound = true;
  host.on('plotly_click', (event) => {
    const point = event.points && event.points[0];
    if (!point) return;
    const custom = point.customdata == null ? null : Array.from([].concat(ArrayBuffer.isView(point.customdata) ? Array.from(point.customdata) : point.customdata));
    trigger('select', { x: point.x, y: point.y, curve: point.curveNumber, custom });
  });
}

if (!Plotly) {
  host.textContent = 'The chart library could not be loaded. Reload the page.';
} else {
  watch('value', draw);
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ['class'] });
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
