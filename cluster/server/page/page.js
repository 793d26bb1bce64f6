// The page of a server. All text is set by textContent: what a model writes is never markup.
"use strict";

const $ = (id) => document.getElementById(id);
const KEY_NAME = "saqqara-key"; // in sessionStorage: gone with the tab
const POLL_MS = 1000;
const BUSY_POLL_MS = 400; // while an answer comes
const LONG_TEXT = 600; // characters of a message that are shown without folding
const SPARK_POINTS = 60;
const SVG = "http://www.w3.org/2000/svg";

const chat = { settings: null, model: null, history: [], running: null, numTurns: 0, kept: null };

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const number = (value) => Math.round(value).toLocaleString("en");
const percent = (part, whole) => (whole > 0 ? `${Math.round((100 * part) / whole)}%` : "–");

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) {
    value /= 1024;
    place += 1;
  }
  return `${value >= 100 || place === 0 ? Math.round(value) : value.toFixed(1)} ${units[place]}`;
}

/** Say it to all, or to screen readers only: what can be seen anyway. */
function say(text, isSeen = false) {
  $("status").textContent = text;
  $("status").classList.toggle("unseen", isSeen);
}

// ---------------------------------------------------------------- the server

/** What a request has failed with, and what to do about it. */
class Failure extends Error {
  constructor(status, message, param, retrySeconds) {
    super(message);
    this.status = status;
    this.param = param;
    this.retrySeconds = retrySeconds;
  }

  get advice() {
    const wait = this.retrySeconds ? `in ${this.retrySeconds} s` : "in a moment";
    switch (this.status) {
      case 0: return "Is the server still running, and can this machine reach it?";
      case 400: return this.param ? `Change “${this.param}” and try again.` : "Change it and try again.";
      case 401: return "Put a key of this server into the field “API key”.";
      case 403: return "Open the page by an address or as localhost, or start the server with this page’s name in --allowed-hosts and its origin in --allowed-origins.";
      case 413: return "The message is too long for this server; shorten it or start a new chat.";
      case 429: return `Too many requests wait already; try again ${wait}.`;
      case 503: return `The engine cannot take requests now; try again ${wait}.`;
      default: return "The server’s log says more.";
    }
  }
}

function failureOf(status, body, retryAfter) {
  const error = body && body.error ? body.error : {};
  const message = error.message || `The server has answered with status ${status}.`;
  return new Failure(status, String(message), error.param || null, Number(retryAfter) || 0);
}

/** A request to a path beside this page, with the key if there is one. */
async function ask(path, body, signal) {
  const headers = {};
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    const method = body ? "POST" : "GET";
    answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "The server does not answer.", null, 0);
  }
  if (answer.ok) return answer;
  const data = await answer.json().catch(() => null);
  throw failureOf(answer.status, data, answer.headers.get("Retry-After"));
}

/** The events of a streamed answer, as objects. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      const data = piece.startsWith("data: ") ? piece.slice(6) : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// ---------------------------------------------------------------- one answer

/** A card with one answer as it comes. */
class Answer {
  constructor(title, kind) {
    this.title = title;
    this.text = "";
    this.kept = null;
    this.calls = new Map();
    this.thoughts = null;
    this.finish = null;
    this.usage = null;
    this.failure = null;
    this.started = performance.now();
    this.firstAt = null;
    this.card = element("section", `answer ${kind}`);
    this.card.setAttribute("aria-label", `Answer with ${title}`);
    const head = element("h3");
    head.append(element("b", "", title));
    this.state = head.appendChild(element("span", "", "waits"));
    this.body = element("div", "text waits");
    this.meter = element("div", "meter");
    this.meter.hidden = true;
    this.meter.append(element("i"));
    this.facts = element("p", "facts");
    this.layers = shape("svg", { class: "pyramid mini empty", role: "img" });
    const end = element("div", "end");
    end.append(this.layers, this.facts);
    this.card.append(head, this.body, this.meter, end);
  }

  /** Ask and show what comes; never throws. */
  async run(request, signal) {
    try {
      const answer = await ask("v1/chat/completions", request, signal);
      for await (const event of events(answer)) this.take(event);
      this.state.textContent = { length: "cut at its length" }[this.finish] || "done";
    } catch (error) {
      if (error.name === "AbortError") this.state.textContent = "stopped";
      else this.fail(error instanceof Failure ? error : new Failure(0, `The answer broke off: ${error.message}`, null, 0));
    }
    this.body.classList.remove("waits");
    this.showFacts();
  }

  take(event) {
    if (event.error) throw failureOf(Number(event.error.code) || 500, event, null);
    if (event.usage) this.usage = event.usage;
    for (const choice of event.choices || []) {
      const delta = choice.delta || {};
      const thought = delta.reasoning_content || delta.reasoning;
      if (this.firstAt === null && (delta.content || thought || delta.tool_calls)) {
        this.firstAt = performance.now();
        this.state.textContent = "writes";
      }
      if (thought) this.think(thought);
      if (delta.content) {
        this.text += delta.content;
        this.body.textContent = this.text;
      }
      for (const call of delta.tool_calls || []) this.call(call);
      if (choice.finish_reason) this.finish = choice.finish_reason;
    }
    follow();
  }

  think(text) {
    if (!this.thoughts) {
      const fold = element("details", "thoughts");
      fold.append(element("summary", "", "Thoughts"));
      this.thoughts = fold.appendChild(element("div"));
      this.body.before(fold);
    }
    this.thoughts.textContent += text;
  }

  call(delta) {
    const index = delta.index || 0;
    if (!this.calls.has(index)) {
      const line = element("pre", "calls");
      this.meter.before(line);
      this.calls.set(index, { line, name: "", args: "" });
    }
    const call = this.calls.get(index);
    const given = delta.function || {};
    call.name += given.name || "";
    call.args += given.arguments || "";
    call.line.textContent = `calls ${call.name}(${call.args})`;
  }

  fail(failure) {
    this.failure = failure;
    this.state.textContent = "failed";
    const box = element("div", "error");
    box.setAttribute("role", "alert");
    box.append(element("p", "", failure.message), element("p", "", failure.advice));
    this.meter.before(box);
    if (failure.status === 401) askForKey();
  }

  showFacts() {
    const seconds = (performance.now() - (this.firstAt || this.started)) / 1000;
    const parts = [];
    const cache = this.usage && this.usage.kv_cache;
    if (cache) parts.push(this.showKept(cache));
    if (this.usage) {
      const written = this.usage.completion_tokens;
      parts.push(`${number(this.usage.prompt_tokens)} tokens in, ${number(written)} out`);
      if (written > 1 && seconds > 0) parts.push(`${((written - 1) / seconds).toFixed(1)} per second`);
    }
    if (this.firstAt !== null) {
      parts.push(`first after ${((this.firstAt - this.started) / 1000).toFixed(2)} s`);
    }
    this.facts.append(...parts.flatMap((part, i) => (i ? [" · ", part] : [part])));
  }

  /** The share that was kept, as a bar and in words. */
  showKept(cache) {
    const { kept_bytes: kept, full_bytes: full, kept_tokens_by_layer: layers } = cache;
    this.meter.hidden = false;
    this.meter.firstChild.style.width = full > 0 ? `${Math.min(100, (100 * kept) / full)}%` : "0";
    this.layers.classList.remove("empty");
    // Of all kv heads together; a text's last token is never fed, so this is their number.
    const tokens = this.usage.total_tokens - 1;
    const numHeads = cache.full_tokens / layers.length / tokens;
    this.kept = { title: this.title, layers: layers.map((sum) => sum / numHeads), tokens };
    drawBars(this.layers, this.kept.layers, tokens);
    return element("b", "", `kept ${bytes(kept)} of ${bytes(full)} (${percent(kept, full)})`);
  }
}

// ---------------------------------------------------------------- the chat

/** What of a request is the same for both answers. */
function commonRequest(messages) {
  const given = (id) => ($(id).value.trim() === "" ? undefined : Number($(id).value));
  const seed = given("seed");
  return {
    model: chat.model,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: given("max-tokens"),
    temperature: given("temperature"),
    seed: seed === undefined ? Math.floor(Math.random() * 2 ** 31) : seed,
  };
}

/** The retention that is chosen: its title and its fields of the request. */
function chosenRetention() {
  const name = $("retention").value;
  if (!name) return { title: chat.settings.default, fields: {} };
  if ($("budget").disabled) return { title: name, fields: { retention: name } };
  const text = $("budget").value.trim();
  const budget = /^\d+$/.test(text) ? Number(text) : text;
  return { title: `${name}, ${text}`, fields: { retention: name, budget } };
}

function showAsked(text) {
  const box = element("div", "asked");
  if (text.length <= LONG_TEXT) {
    box.textContent = text;
    return box;
  }
  const cut = text.lastIndexOf("\n\n");
  const tail = cut > 0 && text.length - cut < LONG_TEXT ? text.slice(cut + 2) : "";
  const fold = element("details");
  fold.append(element("summary", "", `A text of ${number(text.split(/\s+/).length)} words`));
  fold.append(element("div", "long", tail ? text.slice(0, cut) : text));
  box.append(fold, tail);
  return box;
}

async function send(text) {
  if (chat.running) return;
  if (!chat.model && !(await loadModel())) return;
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  messages.push(...chat.history, { role: "user", content: text });
  const chosen = chosenRetention();
  const request = commonRequest(messages);
  const ours = new Answer(chosen.title, "ours");
  const answers = [ours];
  const runs = [[ours, { ...request, ...chosen.fields }]];
  if ($("compare").checked && chosen.fields.retention !== "full") {
    const other = new Answer("full", "other");
    answers.push(other);
    runs.push([other, { ...request, retention: "full" }]);
  }

  $("intro").hidden = true;
  const turn = element("article", "turn");
  turn.setAttribute("aria-label", `Message ${(chat.numTurns += 1)}`);
  const cards = element("div", "answers");
  cards.append(...answers.map((answer) => answer.card));
  turn.append(showAsked(text), cards);
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;

  setRunning(new AbortController());
  say("The answer comes.", true);
  const { signal } = chat.running;
  await Promise.all(runs.map(([answer, body]) => answer.run(body, signal)));
  setRunning(null);
  conclude(text, turn, answers);
}

/** Take the turn into the conversation, or offer to try again; say how the answers compare. */
function conclude(text, turn, answers) {
  if (!turn.isConnected) return; // a new chat has begun
  const [ours, other] = answers;
  if (ours.failure && !ours.text) {
    const again = element("button", "quiet", "Try again");
    again.type = "button";
    again.addEventListener("click", () => {
      turn.remove();
      send(text);
    });
    ours.card.querySelector(".error").append(again);
    say("The answer has failed.", true);
    return;
  }
  chat.kept = ours.kept;
  chat.history.push({ role: "user", content: text }, { role: "assistant", content: ours.text });
  if (other && !other.failure && ours.text && other.text) {
    const note = element("p", "help", comparison(ours.text, other.text));
    turn.append(note);
    say(`The answers are there. ${note.textContent}`, true);
  } else {
    say("The answer is there.", true);
  }
  follow();
}

function comparison(a, b) {
  if (a === b) return "Both answers are the same, word for word.";
  const one = a.split(/\s+/);
  const two = b.split(/\s+/);
  let same = 0;
  while (same < one.length && one[same] === two[same]) same += 1;
  return same ? `The answers are the same for ${number(same)} words, then differ.` : "The answers differ from the first word on.";
}

function setRunning(controller) {
  chat.running = controller;
  $("stop").hidden = !controller;
  $("send").disabled = Boolean(controller);
  $("log").setAttribute("aria-busy", String(Boolean(controller)));
}

/** Keep the end in view for those who are there. */
function follow() {
  const log = $("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

/** A diary with one event that is not like the others. */
function diary() {
  const crews = ["north", "south", "east", "west"];
  const goods = ["limestone blocks", "baskets of clay", "cedar beams", "jars of water", "copper chisels"];
  const days = [];
  for (let day = 1; day <= 60; day += 1) {
    days.push(`Day ${day}: the ${crews[(day * 7) % 4]} crew brought ${20 + ((day * 37) % 80)} ${goods[(day * 3) % 5]} to the pyramid.`);
    if (day === 23) days.push("That evening the cook Nefret found a blue cat made of glass under the old fig tree.");
  }
  return days.join("\n");
}

const EXAMPLES = {
  find: () => `${diary()}\n\nWhat did the cook Nefret find, and where was it?`,
  sum: () => `${diary()}\n\nSum up this diary in two sentences.`,
  ask: () => "Where is the oldest step pyramid, and who built it?",
};

// ---------------------------------------------------------------- the engine

const live = { rates: [], timer: 0 };

async function poll() {
  clearTimeout(live.timer);
  if (!document.hidden) {
    try {
      showStats(await (await ask("stats")).json());
      $("stats-note").textContent = "";
    } catch (error) {
      $("stats-note").textContent = error instanceof Failure && error.status === 401
        ? "Live figures need the API key, too."
        : `No live figures: ${error.message}`;
      if (error.status === 0) showHealth("no connection");
    }
  }
  live.timer = setTimeout(poll, chat.running ? BUSY_POLL_MS : POLL_MS);
}

function showHealth(text) {
  const health = $("health");
  if (health.textContent !== text) health.textContent = text; // screen readers hear changes only
}

function showStats(stats) {
  const { kv_cache: kv, queue, throughput, pyramid } = stats;
  showHealth(stats.is_ready ? "ready" : "starts lost workers again");
  $("kv").textContent = kv.full_bytes
    ? `${bytes(kv.kept_bytes)} of ${bytes(kv.full_bytes)} (${percent(kv.kept_bytes, kv.full_bytes)})`
    : "nothing held now";
  $("rate").textContent = throughput.generation_tokens_per_second.toFixed(1);
  $("running").textContent = number(queue.running);
  $("waiting").textContent = number(queue.waiting);
  live.rates.push(throughput.generation_tokens_per_second);
  live.rates.splice(0, live.rates.length - SPARK_POINTS);
  drawRates();
  drawPyramid(pyramid);
}

function drawRates() {
  const top = Math.max(1, ...live.rates);
  const step = 120 / (SPARK_POINTS - 1);
  const from = SPARK_POINTS - live.rates.length;
  const points = live.rates.map((rate, i) => `${((from + i) * step).toFixed(1)},${(31 - (30 * rate) / top).toFixed(1)}`);
  $("spark").firstElementChild.setAttribute("points", points.join(" "));
}

function layerOfBars() {
  const layer = shape("g", {});
  layer.append(shape("title", {}), shape("rect", { class: "full", rx: 1 }), shape("rect", { class: "kept", rx: 1 }));
  return layer;
}

/** Bars by layer, the lowest at the bottom, kept before full; returns the same in words. */
function drawBars(svg, kept, full) {
  const width = 320;
  const height = 272;
  const gap = kept.length > 60 ? 0.5 : 1.5;
  const step = height / kept.length;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  if (svg.childElementCount !== kept.length) svg.replaceChildren(...kept.map(layerOfBars));
  for (const [layer, tokens] of kept.entries()) {
    const [title, ...bars] = svg.children[layer].children;
    title.textContent = `Layer ${layer}: ${number(tokens)} of ${number(full)} tokens`;
    for (const [place, size] of [width, Math.min(1, tokens / full) * width].entries()) {
      const y = height - (layer + 1) * step;
      const drawn = { x: (width - size) / 2, y, width: size, height: Math.max(step - gap, 0.5) };
      for (const [name, value] of Object.entries(drawn)) bars[place].setAttribute(name, value);
    }
  }
  const mean = kept.reduce((sum, tokens) => sum + tokens, 0) / kept.length;
  const most = Math.max(...kept);
  const least = Math.min(...kept);
  const last = kept.length - 1;
  const words = `${number(mean)} of ${number(full)} tokens a layer (${percent(mean, full)}), between ${number(least)} and ${number(most)}; layer 0 is at the bottom, ${last} on top.`;
  svg.setAttribute("aria-label", words);
  return words;
}

/** What is kept now: of those sequences that run, or of what ran last. */
function drawPyramid({ kept_tokens: kept, full_tokens: full, is_live: isLive, num_sequences: count }) {
  if (!isLive && chat.kept) {
    const words = drawBars($("pyramid"), chat.kept.layers, chat.kept.tokens);
    $("pyramid-note").textContent = `Your last answer, ${chat.kept.title}: ${words}`;
  } else if (kept.length && full > 0) {
    const words = drawBars($("pyramid"), kept, full);
    const whose = count === 1 ? "One sequence" : `Mean of ${number(count)} sequences`;
    $("pyramid-note").textContent = isLive ? `${whose} now: ${words}` : `What ran last: ${words}`;
  }
}

// ---------------------------------------------------------------- settings

function askForKey() {
  $("key-row").hidden = false;
  $("key").focus();
}

function storeKey() {
  try {
    sessionStorage.setItem(KEY_NAME, $("key").value);
  } catch { /* a browser that stores nothing: the field itself keeps it */ }
}

function storedKey() {
  try {
    return sessionStorage.getItem(KEY_NAME) || "";
  } catch {
    return "";
  }
}

/** Learn the model's name, which also tells whether the key is right. */
async function loadModel() {
  try {
    const models = await (await ask("v1/models")).json();
    chat.model = models.data[0].id;
    $("model").textContent = chat.model;
    if ($("key-row").hidden === false) say("The key is right.");
    return true;
  } catch (error) {
    if (error.status === 401) askForKey();
    say(error.status === 401 && !$("key").value
      ? "This server wants an API key."
      : `${error.message} ${error.advice || ""}`);
    return false;
  }
}

function showMethod() {
  const method = chat.settings.methods.find((m) => m.name === $("retention").value);
  const takesBudget = Boolean(method && method.takes_budget);
  $("budget").disabled = !takesBudget;
  $("share").disabled = !takesBudget;
  $("compare").disabled = Boolean(method && method.name === "full");
  if (!method) {
    $("keeps").textContent = "As the server keeps it unless told.";
    return;
  }
  const needs = method.needs === "nothing" || method.needs === "a budget" ? "" : ` Needs ${method.needs}.`;
  $("keeps").textContent = `Keeps ${method.keeps}.${needs}`;
}

function setBudget(text) {
  $("budget").value = text;
  const share = /^(\d+(?:\.\d+)?)%$/.exec(text.trim());
  if (share) $("share").value = share[1];
}

function fillMethods(settings) {
  const own = element("option", "", `as the server: ${settings.default}`);
  own.value = "";
  const options = settings.methods.map((method) => {
    const option = element("option", "", method.name);
    option.value = method.name;
    return option;
  });
  $("retention").append(own, ...options);
  $("retention").value = settings.default === "full" ? settings.suggested : "";
  setBudget("25%");
  showMethod();
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("prompt").value;
    if (!text.trim() || chat.running || !chat.settings) return;
    $("prompt").value = "";
    send(text);
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("composer").requestSubmit();
  });
  const stop = () => chat.running && chat.running.abort();
  $("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  $("clear").addEventListener("click", () => {
    stop();
    chat.history = [];
    for (const turn of document.querySelectorAll(".turn")) turn.remove();
    $("intro").hidden = false;
    say("");
    $("prompt").focus();
  });
  $("examples").addEventListener("click", (event) => {
    const button = event.target.closest("button[data-example]");
    if (button && chat.settings) send(EXAMPLES[button.dataset.example]());
  });
  $("retention").addEventListener("change", showMethod);
  $("share").addEventListener("input", () => setBudget(`${$("share").value}%`));
  $("budget").addEventListener("input", () => setBudget($("budget").value));
  $("key").addEventListener("change", () => {
    storeKey();
    loadModel();
    poll();
  });
  document.addEventListener("visibilitychange", () => !document.hidden && poll());
}

async function start() {
  listen();
  $("key").value = storedKey();
  try {
    chat.settings = await (await ask("ui/settings.json")).json();
  } catch (error) {
    say(`${error.message} Load the page again.`);
    return;
  }
  $("key-row").hidden = !chat.settings.needs_key;
  fillMethods(chat.settings);
  await loadModel();
  poll();
}

start();
