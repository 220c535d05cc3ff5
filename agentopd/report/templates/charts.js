"use strict";
// Every string of the run enters the page through textContent, never as markup.
function el(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

const tip = document.getElementById("tip");
function showTip(rows, x, y) {
  tip.replaceChildren(...rows);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18) + "px";
}
const hideTip = () => { tip.hidden = true; };
const tipRow = (name, value, mark) => el("div", "row", ...(mark ? [mark] : []), el("span", "", name), el("b", "", value));

const data = JSON.parse(document.getElementById("data").textContent);

// The nearest step under the pointer, or stepped through by arrow keys.
for (const plot of document.querySelectorAll(".plot")) {
  const chart = data.charts[plot.dataset.chart];
  const cursor = plot.querySelector(".cursor");
  let index = chart.x.length - 1;
  const show = (y) => {
    const box = plot.getBoundingClientRect();
    cursor.style.left = chart.at[index] / 10 + "%";
    cursor.style.opacity = .6;
    const rows = chart.series.map((s) => s.y[index] === null ? null : tipRow(s.name, s.y[index], el("i", "swatch c" + s.colour)));
    showTip([el("p", "", "step " + chart.x[index]), ...rows.filter(Boolean)], box.left + box.width * chart.at[index] / 1000, y ?? box.top);
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
