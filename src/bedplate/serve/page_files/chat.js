// Models, columns and their conversations. No part of it draws.

import { Refused, get, stream } from "./api.js";

export const HUES = 6; // of adapters; a base has none
export const MOST_COLUMNS = 8;
const CHAT = "v1/chat/completions";

export const state = {
  models: [],
  columns: [],
  settings: { system: "", temperature: 0, top_p: 1, max_tokens: 256, seed: "" },
  compared: null, // the ids of two columns
  problem: "", // that keeps the page from working
  needsKey: false,
};

const drawers = new Set();
let waiting = false;

/** Draw what has changed. Many calls at once are one. */
export function redraw() {
  if (waiting) return;
  waiting = true;
  setTimeout(() => {
    waiting = false;
    drawers.forEach((draw) => draw());
  }, 16);
}

export function onRedraw(draw) {
  drawers.add(draw);
  return () => drawers.delete(draw);
}

export const isRunning = () => state.columns.some((column) => running(column));
export const running = (column) => column.turns.find((turn) => turn.status === "running");

/** Ask the server which models there are. */
export async function loadModels() {
  try {
    state.models = modelsOf((await get("v1/models")).data);
    state.problem = "";
    state.needsKey = false;
    if (!state.columns.length) firstColumns();
  } catch (error) {
    state.needsKey = error instanceof Refused && error.status === 401;
    state.problem = state.needsKey ? "" : problemOf(error);
  }
  redraw();
}

const problemOf = (error) => (error instanceof Refused ? error.message : "The server does not answer.");

/** adapter: its name, or null for a base.  name: what requests call it. */
function modelsOf(cards) {
  const ids = cards.map((card) => card.id);
  const hues = new Map();
  return cards.map((card) => {
    if (card.parent === null) return { name: card.id, base: card.id, adapter: null, hue: 0 };
    const adapter = card.id.startsWith(`${card.parent}:`) ? card.id.slice(card.parent.length + 1) : card.id;
    const isUnique = ids.indexOf(card.id) === ids.lastIndexOf(card.id);
    hues.set(card.parent, (hues.get(card.parent) ?? 0) + 1);
    const hue = ((hues.get(card.parent) - 1) % HUES) + 1;
    return { name: isUnique ? card.id : `${card.parent}:${adapter}`, base: card.parent, adapter, hue };
  });
}

export const isBase = (model) => model.adapter === null;
export const same = (one, other) => one.base === other.base && one.adapter === other.adapter;

/** A base and its first adapters: what there is, up to three. */
function firstColumns() {
  const [base] = state.models;
  const own = state.models.filter((model) => model.base === base.base).slice(0, 3);
  for (const model of own.length > 1 ? own : [base, base]) addColumn(model);
}

export function addColumn(model) {
  const free = [..."ABCDEFGH"].find((id) => !state.columns.some((column) => column.id === id));
  state.columns.push({ id: free, model: model ?? nextModel(), scale: 1, turns: [] });
  state.columns.sort((one, other) => one.id.localeCompare(other.id));
  redraw();
}

/** The first model that no column has. */
const nextModel = () =>
  state.models.find((model) => !state.columns.some((column) => same(column.model, model))) ?? state.models[0];

export function removeColumn(column) {
  stop(column);
  state.columns = state.columns.filter((one) => one !== column);
  if (state.compared?.includes(column.id)) state.compared = null;
  redraw();
}

export function reset() {
  stopAll();
  for (const column of state.columns) column.turns = [];
  redraw();
}

export function stop(column) {
  running(column)?.abort.abort();
}

export const stopAll = () => state.columns.forEach(stop);

/** A turn counts for the conversation if something was answered. */
function messages(column, system, prompt) {
  const said = column.turns.filter((turn) => turn.text && turn.status !== "failed");
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...said.flatMap((turn) => [
      { role: "user", content: turn.prompt },
      { role: "assistant", content: turn.text },
    ]),
    { role: "user", content: prompt },
  ];
}

function requestOf(column, prompt) {
  const { model, scale } = column;
  const { system, temperature, top_p, max_tokens, seed } = state.settings;
  const isShadowed = isBase(model) && state.models.some((one) => one.adapter === model.name);
  return {
    model: model.name,
    ...(!isBase(model) && scale !== 1 ? { lora: [{ id: model.adapter, scale }] } : {}),
    ...(isShadowed ? { lora: [] } : {}),
    messages: messages(column, system, prompt),
    temperature,
    top_p,
    max_tokens,
    ...(seed === "" ? {} : { seed }),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** One prompt to all columns. Resolves when all answers have ended. */
export const send = (prompt) => Promise.all(state.columns.map((column) => ask(column, prompt)));

/** status: running, done, stopped or failed.  pieces: of text, so far.  first, last: seconds until they came. */
async function ask(column, prompt) {
  const turn = {
    prompt,
    model: column.model,
    scale: column.scale,
    request: requestOf(column, prompt),
    status: "running",
    text: "",
    pieces: 0,
    first: null,
    last: null,
    started: performance.now(),
    abort: new AbortController(),
  };
  column.turns.push(turn);
  redraw();
  try {
    for await (const piece of stream(CHAT, turn.request, turn.abort.signal)) take(turn, piece);
    turn.status = "done";
  } catch (error) {
    turn.status = turn.abort.signal.aborted ? "stopped" : "failed";
    turn.problem = problemOf(error);
    if (error instanceof Refused && error.status === 401) state.needsKey = true;
  }
  redraw();
}

function take(turn, piece) {
  const [choice] = piece.choices;
  if (choice?.delta?.content) {
    turn.last = (performance.now() - turn.started) / 1000;
    turn.first ??= turn.last;
    turn.text += choice.delta.content;
    turn.pieces++;
    redraw();
  }
  turn.finish = choice?.finish_reason ?? turn.finish;
  turn.usage = piece.usage ?? turn.usage;
}
