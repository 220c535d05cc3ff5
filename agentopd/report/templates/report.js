"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const byId = (id) => document.getElementById(id);

  // Every string of the run enters the page through textContent, never as markup.
  function el(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function showTip(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
  }
  const hideTip = () => { tip.hidden = true; };

  // --- charts: the nearest step under the pointer, or stepped through by arrow keys ------------------------------

  for (const plot of document.querySelectorAll(".plot")) {
    const chart = data.charts[plot.dataset.chart];
    const cursor = plot.querySelector(".cursor");
    let index = chart.x.length - 1;
    const show = (y) => {
      const box = plot.getBoundingClientRect();
      cursor.style.left = chart.at[index] / 10 + "%";
      cursor.style.opacity = .6;
      const rows = chart.series.filter((s) => s.y[index] !== null).map((s) => s.name + "  " + s.y[index]);
      showTip(["step " + chart.x[index], ...rows].join("\n"), box.left + box.width * chart.at[index] / 1000, y ?? box.top);
    };
    const hide = () => { cursor.style.opacity = 0; hideTip(); };
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * 1000;
      index = chart.at.reduce((best, x, i) => Math.abs(x - at) < Math.abs(chart.at[best] - at) ? i : best, 0);
      show(event.clientY);
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      event.stopPropagation();
      index = Math.max(0, Math.min(chart.x.length - 1, index + move));
      show();
    });
  }

  // --- inspector -------------------------------------------------------------------------------------------------

  const list = byId("list"), pane = byId("episode");
  if (!list) return;
  const episodes = data.episodes;
  const skill = byId("by-skill"), outcome = byId("by-outcome"), search = byId("by-text"), colour = byId("by-colour");
  const mark = { passed: "✓", failed: "✗", unjudged: "?" };
  const haystacks = episodes.map((e) => [
    e.id, e.task, e.skill, e.status, e.stop, e.detail, e.error, e.replay ? "replay" : "",
    ...e.flags.flat(), ...e.prompt.flat(),
    ...e.turns.flatMap((t) => [t.tokens.join(""), ...t.replies.flat(), ...t.malformed.flat()]),
  ].join("\n").toLowerCase());
  let shown = [], current = -1, tokenAt = -1;

  for (const name of [...new Set(episodes.map((e) => e.skill))]) skill.append(el("option", "", name));

  function filter() {
    const needle = search.value.trim().toLowerCase();
    shown = episodes.map((_, i) => i).filter((i) =>
      (!skill.value || episodes[i].skill === skill.value) &&
      (!outcome.value || episodes[i].class === outcome.value) &&
      (!needle || haystacks[i].includes(needle)));
    byId("count").textContent = shown.length + (shown.length === 1 ? " episode" : " episodes");
    list.replaceChildren(...shown.map(listItem));
    if (shown.length) select(shown.includes(current) ? current : shown[0], false);
    else { current = -1; pane.replaceChildren(el("p", "muted", "No episode matches.")); }
  }

  function listItem(i) {
    const e = episodes[i], item = el("li");
    item.id = "episode-" + i;
    item.setAttribute("role", "option");
    const sign = el("span", e.class, mark[e.class]);
    sign.title = e.class;
    item.append(sign, el("span", "", e.skill + (e.replay ? " · replay" : "")), el("span", "right", "step " + e.step));
    item.append(el("span", "sub", e.status + " · " + e.task + (e.flags.length ? " · ⚑" : "")));
    item.addEventListener("click", () => select(i));
    return item;
  }

  function select(i, scroll = true) {
    current = i;
    tokenAt = -1;
    hideTip();
    for (const item of list.children) item.setAttribute("aria-selected", item.id === "episode-" + i);
    list.setAttribute("aria-activedescendant", "episode-" + i);
    const item = byId("episode-" + i);
    if (scroll && item) {
      if (item.offsetTop < list.scrollTop) list.scrollTop = item.offsetTop;
      else if (item.offsetTop + item.offsetHeight > list.scrollTop + list.clientHeight)
        list.scrollTop = item.offsetTop + item.offsetHeight - list.clientHeight;
    }
    draw(episodes[i]);
  }

  function draw(e) {
    const facts = [e.skill, "step " + e.step, e.replay ? "replay of an older skill" : "", "ended: " + e.stop,
      "temperature " + e.temperature, "seed " + e.seed, e.id];
    pane.replaceChildren(el("h3", "", e.task), el("p", "meta", facts.filter(Boolean).join(" · ")), verdict(e));
    for (const [role, text] of e.prompt) pane.append(block("prompt", role, "", text));
    e.turns.forEach((turn, i) => {
      pane.append(assistant(e, turn, i));
      for (const [role, name, text] of turn.replies) pane.append(block("tool", role, name, text));
    });
    if (e.error) pane.append(block("tool", "error", "", e.error));
    paint();
  }

  function verdict(e) {
    const box = el("div", "verdict"), line = el("p");
    line.append(el("span", "status " + e.class, mark[e.class] + " " + e.status));
    if (e.outcome === null) line.append("  could not be judged: no score, no loss weight");
    else line.append("  outcome " + e.outcome + ", reward " + e.reward);
    box.append(line);
    if (e.detail) box.append(el("p", "", e.detail));
    const chips = el("div", "chips");
    for (const [name, value] of Object.entries(e.components)) chips.append(el("span", "chip", name + " " + value));
    for (const [code, detail] of e.flags) chips.append(el("span", "chip flag", "⚑ " + code + (detail ? ": " + detail : "")));
    if (chips.children.length) box.append(chips);
    return box;
  }

  function block(kind, role, name, text) {
    const box = el("div", "turn " + kind), who = el("div", "who");
    who.append(el("b", "", role + (name ? " · " + name : "")));
    box.append(who, el("p", "text", text));
    return box;
  }

  function assistant(e, turn, number) {
    const box = el("div", "turn"), who = el("div", "who"), text = el("p", "text");
    who.append(el("b", "", "assistant · turn " + (number + 1)));
    who.append(el("span", "", turnSummary(turn)));
    text.tabIndex = 0;
    text.setAttribute("aria-label", "Turn " + (number + 1) + "; arrow keys read tokens");
    turn.tokens.forEach((token, i) => text.append(tokenSpan(turn, token, i)));
    text.addEventListener("pointerover", (event) => {
      const span = event.target.closest(".tok");
      if (span) tokenTip(span, event.clientX, event.clientY);
    });
    text.addEventListener("pointerleave", hideTip);
    box.append(who, text);
    for (const [name, args] of turn.calls) box.append(el("p", "call", "→ " + name + " " + args));
    for (const [reason, raw] of turn.malformed) box.append(el("p", "call bad", "malformed call: " + reason + "\n" + raw));
    for (const [at, sign, kind, detail] of e.certificates)
      if (at === number) box.append(el("p", "call" + (sign < 0 ? " bad" : ""), (sign < 0 ? "− " : "+ ") + kind + " " + detail));
    return box;
  }

  function turnSummary(turn) {
    const parts = [turn.tokens.length + " tokens"];
    if (turn.teacher.length) {
      const gap = turn.teacher.reduce((sum, t, i) => sum + t - turn.student[i], 0) / turn.teacher.length;
      parts.push("mean gap " + signed(gap) + " nats");
    }
    if (turn.finish === "length") parts.push("cut by the budget");
    return parts.join(" · ");
  }

  const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
  const percent = (logprob) => (100 * Math.exp(logprob)).toPrecision(3) + " %";

  function tokenSpan(turn, token, i) {
    const span = el("span", "tok");
    span.turn = turn;
    span.index = i;
    if (turn.masks[i] || turn.weights[i] === 0) span.classList.add("out");
    for (const part of token.split(/(\n)/)) {
      if (part === "\n") { span.append(el("span", "ws", "↵"), "\n"); } else span.append(part);
    }
    return span;
  }

  function paint() {
    for (const span of pane.querySelectorAll(".tok")) {
      const { turn, index } = span;
      let value = 0;
      if (colour.value === "gap" && turn.teacher.length) value = (turn.teacher[index] - turn.student[index]) / 3;
      if (colour.value === "student") value = turn.student[index] / 3;
      if (colour.value === "weight" && turn.weights.length) value = turn.weights[index] / 1.5;
      const depth = Math.min(1, Math.abs(value)) * .6;
      span.style.background = depth > .015 ? `rgba(var(--${value > 0 ? "more" : "less"}), ${depth.toFixed(3)})` : "";
    }
  }

  function tokenTip(span, x, y) {
    const { turn, index } = span, s = turn.student[index];
    const lines = [JSON.stringify(turn.tokens[index]), "student " + s.toFixed(3) + "  (" + percent(s) + ")"];
    if (turn.teacher.length) {
      const t = turn.teacher[index];
      lines.push("teacher " + t.toFixed(3) + "  (" + percent(t) + ")", "gap " + signed(t - s) + " nats");
    }
    if (turn.weights.length) lines.push("weight " + turn.weights[index].toFixed(3));
    if (turn.masks[index]) lines.push("masked: " + turn.masks[index]);
    showTip(lines.join("\n"), x, y);
  }

  function moveToken(step) {
    const all = [...pane.querySelectorAll(".tok")];
    if (!all.length) return;
    if (all[tokenAt]) all[tokenAt].classList.remove("at");
    tokenAt = Math.max(0, Math.min(all.length - 1, tokenAt + step));
    const span = all[tokenAt];
    span.classList.add("at");
    span.scrollIntoView({ block: "nearest" });
    const box = span.getBoundingClientRect();
    tokenTip(span, box.left, box.bottom);
  }

  function moveEpisode(step) {
    const next = shown[shown.indexOf(current) + step];
    if (next !== undefined) select(next);
  }

  const inView = () => pane.contains(document.activeElement) ||
    byId("inspector").getBoundingClientRect().top < innerHeight * .6;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const onList = event.target === list;
    const actions = {
      j: () => moveEpisode(1), k: () => moveEpisode(-1),
      "/": () => search.focus(),
      ...(inView() && { ArrowRight: () => moveToken(1), ArrowLeft: () => moveToken(-1) }),
      ...(onList && { ArrowDown: () => moveEpisode(1), ArrowUp: () => moveEpisode(-1) }),
    };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  });

  for (const control of [skill, outcome]) control.addEventListener("change", filter);
  search.addEventListener("input", filter);
  colour.addEventListener("change", paint);
  filter();
})();
