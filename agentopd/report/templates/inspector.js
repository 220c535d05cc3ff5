// The episode inspector: episodes on the left, every token of one on the right.
{
  const byId = (id) => document.getElementById(id);
  const list = byId("list"), turns = byId("turns"), strip = byId("strip");
  const episodes = data.episodes;
  const filters = { skill: byId("by-skill"), outcome: byId("by-outcome"), status: byId("by-status"),
    from: byId("from-step"), to: byId("to-step"), text: byId("by-text") };
  const glyph = { passed: "✓", failed: "✗", unjudged: "?" };
  const haystack = (e) => e.haystack ??= [
    e.id, e.task, e.skill, e.status, e.stop, e.detail, e.error, e.replay ? "replay" : "",
    ...e.flags.flat(), ...e.prompt.flat(),
    ...e.turns.flatMap((t) => [t.tokens.join(""), ...t.replies.flat(), ...t.malformed.flat()]),
  ].join("\n").toLowerCase();
  let shown = [], current = -1, spans = [], at = -1;

  for (const [key, field] of [["skill", "skill"], ["status", "status"]])
    for (const name of [...new Set(episodes.map((e) => e[field]))].sort()) filters[key].append(el("option", "", name));

  // --- the list ----------------------------------------------------------------------------------------------------

  function filter() {
    const needle = filters.text.value.trim().toLowerCase();
    const from = filters.from.value === "" ? -Infinity : +filters.from.value;
    const to = filters.to.value === "" ? Infinity : +filters.to.value;
    shown = episodes.map((_, i) => i).filter((i) => {
      const e = episodes[i];
      return (!filters.skill.value || e.skill === filters.skill.value) &&
        (!filters.outcome.value || e.class === filters.outcome.value) &&
        (!filters.status.value || e.status === filters.status.value) &&
        e.step >= from && e.step <= to && (!needle || haystack(e).includes(needle));
    });
    byId("count").textContent = shown.length + (shown.length === 1 ? " episode" : " episodes");
    list.replaceChildren(...shown.map(item));
    byId("episode").classList.toggle("none", !shown.length);
    if (shown.length) select(shown.includes(current) ? current : shown[0], false);
    else current = -1;
  }

  function item(i) {
    const e = episodes[i], node = el("li");
    node.id = "episode-" + i;
    node.setAttribute("role", "option");
    node.append(el("span", e.class, glyph[e.class]), el("span", "", e.skill + (e.replay ? " · replay" : "")),
      el("span", "right", "step " + e.step), el("span", "sub", e.status + " · " + e.task + (e.flags.length ? " · ⚑" : "")));
    node.addEventListener("click", () => select(i));
    return node;
  }

  function select(i, scroll = true) {
    current = i;
    hideTip();
    for (const node of list.children) node.setAttribute("aria-selected", node.id === "episode-" + i);
    list.setAttribute("aria-activedescendant", "episode-" + i);
    const node = byId("episode-" + i);
    if (scroll && node) {
      if (node.offsetTop < list.scrollTop) list.scrollTop = node.offsetTop;
      else if (node.offsetTop + node.offsetHeight > list.scrollTop + list.clientHeight)
        list.scrollTop = node.offsetTop + node.offsetHeight - list.clientHeight;
    }
    draw(episodes[i]);
  }

  // --- one episode -------------------------------------------------------------------------------------------------

  function draw(e) {
    const facts = [e.skill, "step " + e.step, e.replay ? "replay of an older skill" : "", "ended: " + e.stop,
      "temperature " + e.temperature, "seed " + e.seed, e.id];
    byId("head").replaceChildren(el("h3", "", e.task), el("p", "meta", facts.filter(Boolean).join(" · ")), verdict(e), ...e.diffs.map(diff));
    spans = [];
    at = -1;
    turns.replaceChildren(...e.prompt.map(([role, text]) => role === "system" && text.split("\n").length > 3 ? folded(role, text) : block("prompt", role, "", text)));
    e.turns.forEach((turn, i) => {
      turns.append(assistant(e, turn, i));
      for (const [role, name, text] of turn.replies) turns.append(block("tool", role, name, text));
    });
    if (e.error) turns.append(block("tool", "error", "", e.error));
    if (spans.length) spans[0].tabIndex = 0;
    paint();
  }

  function verdict(e) {
    const line = el("p", "", el("span", "status " + e.class, glyph[e.class] + " " + e.status));
    line.append(e.outcome === null ? "  could not be judged: no score, no loss weight" : "  outcome " + e.outcome + ", reward " + e.reward);
    const box = el("div", "verdict", line);
    if (e.detail) box.append(el("p", "", e.detail));
    const chips = el("div", "chips");
    for (const [name, value] of Object.entries(e.components)) {
      const chip = el("span", "chip" + (value ? "" : " zero"), name.replaceAll("_", " ") + " ", el("b", "", value));
      chips.append(chip);
    }
    for (const [code, detail] of e.flags) chips.append(el("span", "chip flag", "⚑ " + code + (detail ? ": " + detail : "")));
    if (chips.children.length) box.append(chips);
    return box;
  }

  function diff([title, lines]) {
    const body = el("pre", "diff");
    body.tabIndex = 0;
    for (const line of lines) {
      const kind = { "+": "plus", "-": "minus", "@": "hunk" }[line[0]] ?? "";
      body.append(el("span", kind, line + "\n"));
    }
    const added = lines.filter((l) => l[0] === "+").length, gone = lines.filter((l) => l[0] === "-").length;
    const box = el("details", "changed", el("summary", "", title === "gold" ? "The gold change " : "What changed in " + title + " ",
      el("span", "up", "+" + added), " ", el("span", "down", "−" + gone)), body);
    box.open = title !== "gold";
    return box;
  }

  function block(kind, role, name, text) {
    return el("div", "turn " + kind, el("div", "who", el("b", "", role + (name ? " · " + name : ""))), el("p", "text", text));
  }

  function folded(role, text) {
    const lines = text.split("\n").length;
    return el("details", "turn prompt", el("summary", "who", el("b", "", role), el("span", "", lines + " lines")), el("p", "text", text));
  }

  function assistant(e, turn, number) {
    const text = el("p", "text");
    turn.tokens.forEach((token, i) => {
      const span = el("span", "tok");
      for (const part of token.split(/(\n)/)) part === "\n" ? span.append(el("span", "ws", "↵"), "\n") : span.append(part);
      span.turn = turn;
      span.index = i;
      span.place = spans.length;
      span.tabIndex = -1;
      spans.push(span);
      text.append(span);
    });
    const box = el("div", "turn assistant", el("div", "who", el("b", "", "assistant · turn " + (number + 1)), el("span", "", summary(turn))), text);
    for (const [name, args] of turn.calls) box.append(el("p", "call", "→ " + name + " " + args));
    for (const [reason, raw] of turn.malformed) box.append(el("p", "call bad", "malformed call: " + reason + "\n" + raw));
    for (const [where, sign, kind, detail] of e.certificates)
      if (where === number) box.append(el("p", "call" + (sign < 0 ? " bad" : " good"), (sign < 0 ? "− " : "+ ") + kind.replaceAll("_", " ") + " " + detail));
    return box;
  }

  function summary(turn) {
    const parts = [turn.tokens.length + " tokens"];
    if (turn.teacher.length) {
      const gap = turn.teacher.reduce((sum, t, i) => sum + t - turn.student[i], 0) / turn.teacher.length;
      parts.push("mean gap " + signed(gap) + " nats");
    }
    if (turn.finish === "length") parts.push("cut by the budget");
    return parts.join(" · ");
  }

  const signed = (x, digits = 2) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
  const share = (logprob) => (100 * Math.exp(logprob)).toPrecision(3) + " %";

  // --- colours -----------------------------------------------------------------------------------------------------

  // Each view maps a token to [size in -1..1, class]; size is the colour's depth and the bar's height in the strip.
  const gapOf = (turn, i) => turn.teacher.length ? turn.teacher[i] - turn.student[i] : 0;
  const views = {
    gap: { legend: () => ramp("teacher finds it less likely", "more likely", true),
      of: (turn, i) => [gapOf(turn, i) / 3, ""] },
    gate: { legend: () => counted((turn, i) => masked(turn, i) ? "out of the teacher term" : gateName(turn, i),
        { consensus: "agree", conflict: "conflict", neutral: "", "out of the teacher term": "out" }),
      of: (turn, i) => masked(turn, i) ? [0, "out"] : [turn.gate[i] ?? 0, { consensus: "agree", conflict: "conflict" }[gateName(turn, i)] ?? ""] },
    mask: { legend: () => counted((turn, i) => masked(turn, i) || "in the teacher term", {}, "out"),
      of: (turn, i) => masked(turn, i) ? [-1, "out"] : [0, ""] },
    weight: { legend: () => ramp("weight 0", "1.5 and more", false),
      of: (turn, i) => [(turn.weights[i] ?? 0) / 1.5, ""] },
    student: { legend: () => ramp("certain", "surprised: −3 nats and less", false),
      of: (turn, i) => [-turn.student[i] / 3, ""] },
  };
  const masked = (turn, i) => turn.masks[i] ?? "";
  const gateName = (turn, i) => turn.gate[i] > 0 ? "consensus" : turn.gate[i] < 0 ? "conflict" : "neutral";
  const colour = () => document.querySelector("#by-colour input:checked").value;
  const limited = (x) => Math.max(-1, Math.min(1, x));

  function ramp(low, high, diverging) {
    return [low + " ", el("span", diverging ? "ramp diverging" : "ramp"), " " + high];
  }

  function counted(name, classes, other = "") {
    const counts = new Map();
    for (const span of spans) {
      const key = name(span.turn, span.index);
      counts.set(key, (counts.get(key) ?? 0) + 1);
    }
    return [...counts].sort((a, b) => b[1] - a[1]).map(([key, n]) => el("span", "entry",
      el("i", "tok box " + (classes[key] ?? (key.startsWith("in ") ? "" : other))), key + " ", el("b", "", n)));
  }

  function paint() {
    const view = views[colour()], bars = { more: "", less: "" };
    for (const span of spans) {
      const [value, kind] = view.of(span.turn, span.index), size = limited(value);
      span.className = "tok " + kind + (span.place === at ? " at" : "");
      const depth = Math.round(Math.abs(size) * 58);
      span.style.background = kind || depth < 2 ? "" : `color-mix(in srgb, var(--${size > 0 ? "more" : "less"}) ${depth}%, transparent)`;
      if (size) bars[size > 0 ? "more" : "less"] += `M${span.place + .5} 0V${-size.toFixed(3)}`;
    }
    byId("legend").replaceChildren(...view.legend());
    strip.setAttribute("viewBox", `0 -1 ${Math.max(spans.length, 24)} 2`);
    for (const [name, d] of Object.entries({ axis: `M0 0H${spans.length}`, ...bars }))
      strip.querySelector("." + name).setAttribute("d", d);
  }

  strip.addEventListener("click", (event) => {
    const box = strip.getBoundingClientRect();
    focus(Math.floor((event.clientX - box.left) / box.width * Math.max(spans.length, 24)));
  });

  // --- exact numbers -----------------------------------------------------------------------------------------------

  function tokenTip(span, x, y) {
    const { turn, index } = span, s = turn.student[index];
    const rows = [el("p", "", JSON.stringify(turn.tokens[index])), bar("student", s)];
    if (turn.teacher.length) rows.push(bar("teacher", turn.teacher[index]), tipRow("gap", signed(gapOf(turn, index), 3) + " nats"));
    if (turn.gate.length) rows.push(tipRow("gate", gateName(turn, index) + " " + signed(turn.gate[index], 2)));
    if (turn.weights.length) rows.push(tipRow("final weight", turn.weights[index].toFixed(3)));
    if (masked(turn, index)) rows.push(tipRow("masked", masked(turn, index)));
    showTip(rows, x, y);
  }

  function bar(name, logprob) {
    const row = tipRow(name, share(logprob) + "  " + logprob.toFixed(3)), fill = el("i", "fill");
    fill.style.width = 100 * Math.exp(logprob) + "%";
    row.append(el("span", "gauge " + name, fill));
    return row;
  }

  function focus(place) {
    if (!spans.length) return;
    spans[Math.max(at, 0)].classList.remove("at");
    spans[Math.max(at, 0)].tabIndex = -1;
    const span = spans[Math.max(0, Math.min(spans.length - 1, place))];
    span.tabIndex = 0;
    span.focus({ preventScroll: true });
    span.scrollIntoView({ block: "nearest" });
  }

  turns.addEventListener("focusin", (event) => {
    const span = event.target.closest(".tok");
    if (!span) return;
    at = span.place;
    span.classList.add("at");
    const box = span.getBoundingClientRect();
    tokenTip(span, box.left, box.bottom - 12);
  });
  turns.addEventListener("focusout", (event) => {
    event.target.classList.remove("at");
    hideTip();
  });
  turns.addEventListener("pointerover", (event) => {
    const span = event.target.closest(".tok");
    if (span) tokenTip(span, event.clientX, event.clientY);
    else hideTip();
  });
  turns.addEventListener("pointerleave", hideTip);

  // --- keys --------------------------------------------------------------------------------------------------------

  function move(step) {
    const next = shown[shown.indexOf(current) + step];
    if (next !== undefined) select(next);
  }

  function nextColour() {
    const inputs = [...document.querySelectorAll("#by-colour input")];
    inputs[(inputs.findIndex((input) => input.checked) + 1) % inputs.length].checked = true;
    paint();
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !byId("episodes").classList.contains("current")) return;
    if (event.target.matches("input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const onList = event.target === list;
    const actions = {
      j: () => move(1), k: () => move(-1), c: nextColour, "/": () => filters.text.focus(),
      ArrowRight: () => focus(at + 1), ArrowLeft: () => focus(Math.max(0, at - 1)),
      ...(onList && { ArrowDown: () => move(1), ArrowUp: () => move(-1) }),
    };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  });

  for (const control of Object.values(filters)) control.addEventListener("input", filter);
  byId("by-colour").addEventListener("change", paint);
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  // Nothing is drawn before somebody looks.
  document.addEventListener("page", (event) => { if (event.detail === "episodes" && current < 0) filter(); });
}
