// A column: its model, its conversation, and how fast it was answered.

import { isBase, loadModels, redraw, removeColumn, same, state } from "./chat.js";
import { count, rate, seconds } from "./format.js";
import { html, useLayoutEffect, useRef } from "./vendor/htm-preact.js";

/** marks: runs of the text of each turn, where the column is compared. */
export function Column({ column, marks, onCurl }) {
  const log = useRef(null);
  const atEnd = useRef(true);
  useLayoutEffect(() => {
    if (atEnd.current) log.current.scrollTop = log.current.scrollHeight;
  });
  const onScroll = () => {
    const { scrollTop, scrollHeight, clientHeight } = log.current;
    atEnd.current = scrollHeight - scrollTop - clientHeight < 40;
  };
  return html`
    <section class=${`column hue-${column.model.hue}`} aria-label=${`Column ${column.id}`}>
      <header>
        <span class="letter" aria-hidden="true">${column.id}</span>
        <${ModelChoice} column=${column} />
        <button type="button" class="quiet" disabled=${!column.turns.length} onClick=${onCurl}
          aria-label=${`Column ${column.id}: show the request as curl`}>curl</button>
        <button type="button" class="quiet" disabled=${state.columns.length < 2}
          onClick=${() => removeColumn(column)} aria-label=${`Remove column ${column.id}`}>✕</button>
        ${isBase(column.model)
          ? html`<p class="scale">the foundation, without an adapter</p>`
          : html`<${Scale} column=${column} />`}
      </header>
      <ol class="log" ref=${log} onScroll=${onScroll} tabindex="0" aria-label=${`Answers of column ${column.id}`}>
        ${column.turns.map((turn, index) => html`<${Turn} turn=${turn} runs=${marks?.[index]} />`)}
      </ol>
    </section>
  `;
}

function ModelChoice({ column }) {
  const known = state.models.some((model) => same(model, column.model));
  const models = known ? state.models : [column.model, ...state.models];
  const bases = [...new Set(models.map((model) => model.base))];
  const onChange = (event) => {
    column.model = models[Number(event.target.value)];
    column.scale = 1;
    redraw();
  };
  const option = (model) => {
    const index = models.indexOf(model);
    const label = isBase(model) ? `${model.base} (base)` : model.adapter;
    return html`<option value=${index} selected=${same(model, column.model)}>${label}</option>`;
  };
  return html`
    <select aria-label=${`Model of column ${column.id}`} onChange=${onChange} onFocus=${loadModels}>
      ${bases.length === 1
        ? models.map(option)
        : bases.map((base) => html`
            <optgroup label=${base}>${models.filter((model) => model.base === base).map(option)}</optgroup>
          `)}
    </select>
  `;
}

function Scale({ column }) {
  const onInput = (event) => {
    if (event.target.value === "" || !event.target.checkValidity()) return;
    column.scale = Number(event.target.value);
    redraw();
  };
  const slider = { min: 0, max: 2, step: 0.05, value: column.scale, onInput };
  return html`
    <div class="scale">
      <span aria-hidden="true">scale</span>
      <input type="range" ...${slider} aria-label=${`Scale of the adapter in column ${column.id}`} />
      <input type="number" step="any" value=${column.scale} onInput=${onInput}
        aria-label=${`Scale of the adapter in column ${column.id}, as a number`} />
    </div>
  `;
}

function Turn({ turn, runs }) {
  const label = isBase(turn.model) ? "base" : `${turn.model.adapter}${turn.scale === 1 ? "" : ` × ${turn.scale}`}`;
  return html`
    <li class="turn">
      <p class="prompt"><span class="sr">You: </span>${turn.prompt}</p>
      <div class=${`answer hue-${turn.model.hue} ${turn.status}`}>
        <span class="who">${label}</span>
        <p class="text">${runs ? runs.map(Run) : turn.text}</p>
        ${turn.status === "failed" && html`<p class="problem" role="alert">${turn.problem}</p>`}
        <p class="figures">${figures(turn).map((one) => html`<span>${one}</span>`)}</p>
      </div>
    </li>
  `;
}

const Run = (run) => (run.differs ? html`<mark>${run.text}</mark>` : run.text);

/** How fast it came. Tokens that the server has not told yet are taken for as many as the pieces of text. */
function figures(turn) {
  const { status, first, usage } = turn;
  const said = [];
  if (status === "running" && first === null) return ["reading the prompt …"];
  if (first !== null) said.push(`first token ${seconds(first)}`);
  const tokens = usage?.completion_tokens ?? turn.pieces;
  if (turn.last > first) said.push(`${usage ? "" : "about "}${rate((tokens - 1) / (turn.last - first))} tokens/s`);
  if (usage) said.push(count(usage.completion_tokens, "token"));
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (cached) said.push(`${cached} of ${usage.prompt_tokens} prompt tokens cached`);
  if (turn.finish === "length") said.push("cut off at the limit");
  if (status === "stopped") said.push("stopped");
  return said;
}
