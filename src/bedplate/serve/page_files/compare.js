// Two columns, compared turn by turn: words that differ are marked.

import { redraw, state } from "./chat.js";
import { compare } from "./diff.js";
import { count } from "./format.js";
import { html } from "./vendor/htm-preact.js";

const done = new WeakMap(); // left turn → {right, result}; what has ended is compared once

/** Runs of the texts of a turn in two columns, if both have ended. */
function compared(left, right) {
  if (!left || !right || left.status === "running" || right.status === "running") return null;
  const known = done.get(left);
  if (known?.right === right) return known.result;
  const result = compare(left.text, right.text);
  done.set(left, { right, result });
  return result;
}

function pair(ids) {
  const columns = (ids ?? []).map((id) => state.columns.find((column) => column.id === id));
  return columns.length === 2 && columns.every(Boolean) ? columns : null;
}

function results(ids) {
  const columns = pair(ids);
  return columns ? columns[0].turns.map((turn, index) => compared(turn, columns[1].turns[index])) : [];
}

/** For each of two columns, by id, the runs of its turns. */
export function marksOf(ids) {
  if (!pair(ids)) return {};
  const found = results(ids);
  return { [ids[0]]: found.map((one) => one?.left), [ids[1]]: found.map((one) => one?.right) };
}

export function Compare() {
  const { columns, compared: ids } = state;
  const isOn = pair(ids) !== null;
  const choose = (chosen) => {
    state.compared = chosen;
    redraw();
  };
  const onChoice = (place) => (event) => {
    const other = ids[1 - place] === event.target.value ? ids[place] : ids[1 - place];
    choose(place ? [other, event.target.value] : [event.target.value, other]);
  };
  const choice = (place) => html`
    <select aria-label=${place ? "with column" : "Compare column"} onChange=${onChoice(place)}>
      ${columns.map(({ id }) => html`<option value=${id} selected=${id === ids[place]}>${id}</option>`)}
    </select>
  `;
  return html`
    <div class="compare">
      ${isOn && html`<span role="status" class="muted">${summary(ids)}</span>`}
      ${isOn && columns.length > 2 && html`${choice(0)} ${choice(1)}`}
      <button type="button" aria-pressed=${String(isOn)} disabled=${columns.length < 2}
        onClick=${() => choose(isOn ? null : [columns[0].id, columns[1].id])}>Compare</button>
    </div>
  `;
}

function summary(ids) {
  const last = results(ids).at(-1);
  if (!last) return `${ids[0]} and ${ids[1]}: no answers to compare yet`;
  const signs = last.signs ? count(last.signs, "sign differs", "signs differ") : "the same text";
  const said = last.words ? count(last.words, "word differs", "words differ") : signs;
  return `${ids[0]} and ${ids[1]}: ${said}`;
}
