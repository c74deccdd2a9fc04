// What the machine does: memory, the batch as it runs, and its pace.

import { get } from "./api.js";
import { Chart } from "./chart.js";
import { isRunning, state } from "./chat.js";
import { count, rate, size } from "./format.js";
import { html, useEffect, useReducer, useState } from "./vendor/htm-preact.js";

const FAST = 400, SLOW = 2000; // milliseconds between looks
const SPAN = 60; // seconds that the chart shows

/** It looks only while the page is visible and this part is open. */
export function Machine() {
  const [isOpen, setOpen] = useState(true);
  const [seen, see] = useReducer(next, { now: null, samples: [] });
  const runs = isRunning();
  useEffect(() => (isOpen ? looking(see) : undefined), [isOpen, runs]);
  const { now, samples } = seen;
  return html`
    <details class="machine" open=${isOpen} onToggle=${(event) => setOpen(event.target.open)}>
      <summary><h2>The machine</h2></summary>
      ${now && now.bases.map((base) => html`<${Memory} base=${base} isOne=${now.bases.length === 1} />`)}
      ${now && html`<p class="muted">The whole process has ${size(now.process)} in RAM.</p>`}
      ${now && html`<${Batch} state=${now} sample=${samples.at(-1)} />`}
      <${Chart} samples=${samples} span=${SPAN} />
    </details>
  `;
}

/** Look, and go on looking. Returns what ends it. */
function looking(see) {
  let timer = 0, isOver = false;
  const look = async () => {
    let isBusy = isRunning();
    if (document.visibilityState === "visible" && !state.needsKey) {
      const now = await get("v1/bedplate/state").catch(() => null);
      if (isOver) return;
      if (now) see(now);
      isBusy ||= Boolean(now?.bases.some((base) => base.running.length));
    }
    timer = setTimeout(look, isBusy ? FAST : SLOW);
  };
  look();
  return () => {
    isOver = true;
    clearTimeout(timer);
  };
}

/** A look adds a sample: tokens a second, and tokens a step, since the look before. */
function next({ now: before, samples }, now) {
  const time = performance.now() / 1000;
  const total = (looked, name) => looked.bases.reduce((sum, base) => sum + base[name], 0);
  const sample = { time, perSecond: 0, perStep: 0 };
  if (before) {
    const rows = total(now, "rows") - total(before, "rows"), steps = total(now, "steps") - total(before, "steps");
    sample.perSecond = rows / (time - samples.at(-1).time);
    sample.perStep = steps ? rows / steps : 0;
  }
  return { now, samples: [...samples.filter((one) => one.time > time - SPAN), sample] };
}

const hueOf = (base, adapter) =>
  state.models.find((model) => model.base === base && model.adapter === adapter)?.hue ?? 0;

function Memory({ base, isOne }) {
  const { foundation, adapters, kv, cache } = base.memory;
  const loaded = Object.entries(adapters);
  const parts = [
    { name: "foundation", bytes: foundation, look: "foundation", about: "shared by all" },
    ...loaded.map(([name, bytes]) => ({ name, bytes, look: `hue-${hueOf(base.name, name)}`, about: "its own" })),
    { name: "KV", bytes: kv, look: "kv", about: "of running answers" },
    { name: "KV cache", bytes: cache, look: "cache", about: "of earlier prompts" },
  ];
  const own = loaded.reduce((sum, [, bytes]) => sum + bytes, 0);
  const label = parts.map((part) => `${part.name} ${size(part.bytes)}`).join(", ");
  return html`
    <section>
      <h3>Memory${isOne ? "" : ` of ${base.name}`}</h3>
      <div class="bar" role="img" aria-label=${label}>
        ${parts.filter((part) => part.bytes).map((part) => html`
          <span class=${part.look} style=${{ flexGrow: String(part.bytes) }}></span>`)}
      </div>
      <ul class="parts">
        ${parts.map((part) => html`
          <li>
            <span class=${`swatch ${part.look}`}></span>
            <span>${part.name} <span class="muted">${part.about}</span></span>
            <span class="number">${size(part.bytes)}</span>
          </li>`)}
      </ul>
      ${loaded.length > 0 && html`<p class="muted">${count(1 + loaded.length, "model")} in
        ${" "}${size(foundation + own)}. As separate models: ${size(foundation * (1 + loaded.length) + own)}.</p>`}
    </section>
  `;
}

const MOST_SHOWN = 12;

function Batch({ state: { bases, waiting }, sample }) {
  const going = bases.flatMap((base) => base.running.map((one) => ({ ...one, base: base.name })));
  const hidden = going.length - MOST_SHOWN;
  return html`
    <section>
      <h3>Batch</h3>
      <p class="figures">${!going.length ? "idle" : html`
        <span>${count(going.length, "answer")} at once</span>
        ${waiting > 0 && html`<span>${count(waiting, "request waits", "requests wait")}</span>`}
        <span>${sample.perStep.toFixed(1)} tokens a step</span>
        <span>${rate(sample.perSecond)} tokens/s</span>`}
      </p>
      <ul class="parts">${going.slice(0, MOST_SHOWN).map((one) => html`<${Row} one=${one} />`)}</ul>
      ${hidden > 0 && html`<p class="muted">and ${hidden} more</p>`}
    </section>
  `;
}

function Row({ one }) {
  const mixed = Object.entries(one.adapters);
  const name = mixed.map(([adapter, scale]) => (scale === 1 ? adapter : `${adapter} × ${scale}`)).join(" + ");
  const hue = mixed.length === 1 ? hueOf(one.base, mixed[0][0]) : 0;
  const isWriting = one.generated_tokens > 0;
  const said = isWriting
    ? count(one.generated_tokens, "token")
    : `reads ${one.read_tokens} of ${one.prompt_tokens}`;
  return html`
    <li>
      <span class=${`swatch hue-${hue}`}></span>
      <span>${name || "base"}</span>
      <span class="number muted">${said}</span>
    </li>
  `;
}
