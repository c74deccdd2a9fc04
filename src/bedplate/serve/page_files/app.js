// The page: one prompt to several columns, each the base or an adapter.

import { address, apiKey } from "./api.js";
import {
  MOST_COLUMNS, addColumn, isRunning, loadModels, onRedraw, redraw, reset, send, state, stopAll,
} from "./chat.js";
import { Column } from "./column.js";
import { Compare, marksOf } from "./compare.js";
import { curl } from "./curl.js";
import { Machine } from "./machine.js";
import { Settings } from "./settings.js";
import { html, render, useEffect, useReducer, useRef, useState } from "./vendor/htm-preact.js";

function App() {
  const [, draw] = useReducer((count) => count + 1, 0);
  const [shown, setShown] = useState(null); // the column whose request is shown
  useEffect(() => onRedraw(draw), []);
  useEffect(() => {
    loadModels();
    const onVisible = () => document.visibilityState === "visible" && loadModels();
    const onKey = (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) stopAll();
    };
    document.addEventListener("visibilitychange", onVisible);
    document.addEventListener("keydown", onKey);
  }, []);
  const marks = marksOf(state.compared);
  return html`
    <header class="top">
      <h1><img src="page/icon.svg" alt="" width="24" height="24" /> bedplate</h1>
      <p class="about">One prompt, every adapter.</p>
      <div class="tools">
        <${Compare} />
        <button type="button" onClick=${() => addColumn()}
          disabled=${!state.models.length || state.columns.length >= MOST_COLUMNS}>Add column</button>
        <button type="button" onClick=${reset} disabled=${!state.columns.some((one) => one.turns.length)}>
          Start over
        </button>
        ${apiKey.get() && html`<button type="button" onClick=${forgetKey}>Forget key</button>`}
      </div>
    </header>
    <main>
      <div class="work">
        ${state.needsKey && html`<${KeyForm} />`}
        ${state.problem && html`
          <p class="problem notice" role="alert">${state.problem} <button type="button" onClick=${loadModels}>
            Try again</button></p>`}
        <div class="columns">
          ${state.columns.map((column) => html`
            <${Column} key=${column.id} column=${column} marks=${marks[column.id]}
              onCurl=${() => setShown(column)} />`)}
        </div>
        <${Composer} />
      </div>
      <${Machine} />
    </main>
    ${shown && html`<${CurlDialog} column=${shown} onClose=${() => setShown(null)} />`}
  `;
}

function Composer() {
  const input = useRef(null);
  const form = useRef(null);
  const [said, setSaid] = useState(""); // to screen readers
  const runs = isRunning();
  const isReady = state.columns.length > 0 && !runs;
  const onSubmit = async (event) => {
    event?.preventDefault();
    const prompt = input.current.value;
    if (!isReady || !prompt.trim() || !form.current.reportValidity()) return;
    input.current.value = "";
    grow(input.current);
    setSaid("Answers are coming.");
    await send(prompt);
    setSaid("All answers have ended.");
  };
  const onKeyDown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    onSubmit();
  };
  return html`
    <form class="composer" ref=${form} onSubmit=${onSubmit} novalidate>
      <label class="sr" for="prompt">Prompt for all columns</label>
      <textarea id="prompt" ref=${input} rows="2" placeholder="Ask all columns …" autofocus
        onKeyDown=${onKeyDown} onInput=${() => grow(input.current)} aria-describedby="keys"></textarea>
      <div class="actions">
        <${Settings} />
        <span id="keys" class="keys"><kbd>Enter</kbd> sends, <kbd>Shift Enter</kbd> begins a line,
          ${" "}<kbd>Esc</kbd> stops</span>
        <button type="button" aria-disabled=${String(!runs)} onClick=${stopAll}>Stop</button>
        <button type="submit" class="main" aria-disabled=${String(!isReady)}>Send</button>
      </div>
      <p class="sr" role="status">${said}</p>
    </form>
  `;
}

/** A field as high as its text. */
function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function KeyForm() {
  const input = useRef(null);
  useEffect(() => input.current.focus(), []);
  const onSubmit = (event) => {
    event.preventDefault();
    apiKey.set(new FormData(event.target).get("key").trim());
    loadModels();
  };
  return html`
    <form class="notice key-form" onSubmit=${onSubmit}>
      <label for="key">This server wants an API key. It stays in this tab.</label>
      <input id="key" name="key" ref=${input} type="password" autocomplete="off" required />
      <button type="submit" class="main">Use it</button>
      ${apiKey.get() && html`<p class="problem" role="alert">The server does not know the key.</p>`}
    </form>
  `;
}

function forgetKey() {
  apiKey.set("");
  loadModels();
}

function CurlDialog({ column, onClose }) {
  const dialog = useRef(null);
  const text = useRef(null);
  const [isCopied, setCopied] = useState(false);
  useEffect(() => {
    dialog.current.showModal();
  }, []);
  const command = curl(address("v1/chat/completions"), column.turns.at(-1).request, apiKey.get() !== "");
  const onCopy = async () => {
    text.current.select();
    // Only pages of this machine, or by https, may use the clipboard's own interface.
    if (navigator.clipboard) await navigator.clipboard.writeText(command).catch(() => document.execCommand("copy"));
    else document.execCommand("copy");
    setCopied(true);
  };
  return html`
    <dialog ref=${dialog} onClose=${onClose} aria-labelledby="curl-title">
      <h2 id="curl-title">The last request of column ${column.id}</h2>
      <textarea ref=${text} readonly rows="8" spellcheck=${false} aria-label="Command">${command}</textarea>
      <div class="actions">
        <span role="status">${isCopied ? "Copied." : ""}</span>
        <button type="button" onClick=${() => dialog.current.close()}>Close</button>
        <button type="button" class="main" onClick=${onCopy}>Copy</button>
      </div>
    </dialog>
  `;
}

render(html`<${App} />`, document.getElementById("app"));
redraw();
