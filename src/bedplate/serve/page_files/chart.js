// Tokens a second and tokens a step, over the last minute.

import { rate } from "./format.js";
import { html, useEffect, useRef } from "./vendor/htm-preact.js";
import uPlot from "./vendor/uplot.js";

const HEIGHT = 130;

const colour = (name) => () => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const axis = (scale, side) => ({
  scale,
  side,
  size: 38,
  stroke: colour("--muted"),
  grid: { stroke: colour("--line"), width: 1, show: side === 3 },
  ticks: { show: false },
  font: "11px system-ui, sans-serif",
});

const line = (label, scale, name, more) => ({ label, scale, stroke: colour(name), width: 1.5, points: { show: false }, ...more });

const least = (most) => (plot, low, high) => [0, Math.max(high ?? 0, most) * 1.1];

function options(width, span) {
  return {
    width,
    height: HEIGHT,
    padding: [8, 0, 0, 0],
    cursor: { show: false },
    legend: { show: false },
    scales: {
      x: { time: false, range: () => [-span, 0] },
      second: { range: least(10) },
      step: { range: least(4) },
    },
    axes: [
      { ...axis("x", 2), size: 22, values: (plot, ticks) => ticks.map((tick) => (tick ? `${tick} s` : "now")), space: 60 },
      axis("second", 3),
      axis("step", 1),
    ],
    series: [
      {},
      line("tokens/s", "second", "--series-1"),
      line("tokens a step", "step", "--series-2", { dash: [5, 3] }),
    ],
  };
}

export function Chart({ samples, span }) {
  const place = useRef(null);
  const plot = useRef(null);
  useEffect(() => {
    plot.current = new uPlot(options(place.current.clientWidth, span), [[], [], []], place.current);
    const resized = new ResizeObserver(([entry]) =>
      plot.current.setSize({ width: entry.contentRect.width, height: HEIGHT }),
    );
    resized.observe(place.current);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const onScheme = () => plot.current.redraw();
    scheme.addEventListener("change", onScheme);
    return () => {
      resized.disconnect();
      scheme.removeEventListener("change", onScheme);
      plot.current.destroy();
    };
  }, []);
  useEffect(() => {
    const now = samples.at(-1)?.time ?? 0;
    const column = (value) => samples.map(value);
    plot.current.setData([
      column((one) => one.time - now),
      column((one) => one.perSecond),
      column((one) => one.perStep),
    ]);
  }, [samples]);
  const most = Math.max(0, ...samples.map((one) => one.perSecond));
  return html`
    <figure>
      <figcaption>
        <span class="key series-1">tokens/s</span> <span class="key series-2">tokens a step</span>
      </figcaption>
      <div ref=${place} role="img" aria-label=${`Tokens a second over the last minute, at most ${rate(most)}`}></div>
    </figure>
  `;
}
