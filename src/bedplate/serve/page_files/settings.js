// How columns are asked: one way for all of them, so that only the models differ.

import { redraw, state } from "./chat.js";
import { html } from "./vendor/htm-preact.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: "any", hint: "0: the likeliest token" },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: "any" },
  { name: "max_tokens", label: "Most tokens", min: 1, step: 1 },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, hint: "empty: another each time" },
];

export function Settings() {
  const { settings } = state;
  const set = (name, value) => {
    settings[name] = value;
    redraw();
  };
  const onNumber = (event) => {
    const { name, value, validity } = event.target;
    const isOptional = name === "seed";
    if (validity.valid && (value !== "" || isOptional)) set(name, value === "" ? "" : Number(value));
  };
  return html`
    <details class="settings">
      <summary>Settings <span class="muted">temperature ${settings.temperature}, ${settings.max_tokens} tokens${
        settings.system ? ", system message" : ""}</span></summary>
      <div class="fields">
        <label class="wide">System message
          <textarea rows="2" value=${settings.system} onInput=${(event) => set("system", event.target.value)}></textarea>
        </label>
        ${FIELDS.map(({ label, hint, ...field }) => html`
          <label>${label}
            <input type="number" ...${field} required=${field.name !== "seed"} value=${settings[field.name]}
              onInput=${onNumber} />
            ${hint && html`<span class="muted">${hint}</span>`}
          </label>
        `)}
      </div>
    </details>
  `;
}
