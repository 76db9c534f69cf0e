// Tooltip of the curves: the values of every group at the step nearest to the pointer.
for (const svg of document.querySelectorAll("svg.curves")) {
  const data = JSON.parse(svg.dataset.curves);
  const cursor = svg.querySelector(".cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  svg.parentElement.append(tip);
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const x = data.x0 + ((px - data.left) / (data.right - data.left)) * (data.x1 - data.x0);
    const nearest = (xs) => xs.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best), 0);
    const rows = data.curves.map((c) => [c, nearest(c.x)]);
    const step = rows.reduce((a, [c, i]) => (Math.abs(c.x[i] - x) < Math.abs(a - x) ? c.x[i] : a), Infinity);
    tip.replaceChildren(`${data.label} ${Math.round(step)}`);
    for (const [c, i] of rows) {
      const line = document.createElement("div");
      const mark = document.createElement("i");
      mark.className = "swatch";
      mark.style.background = c.c;
      line.append(mark, `${c.g}: ${c.y[i]}${c.s.length ? " ± " + c.s[i] : ""}`);
      tip.append(line);
    }
    const at = data.left + ((step - data.x0) / (data.x1 - data.x0)) * (data.right - data.left);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    tip.hidden = false;
    const left = event.clientX - svg.parentElement.getBoundingClientRect().left;
    tip.style.top = "34px";
    tip.style.left = `${Math.min(left + 14, svg.parentElement.clientWidth - tip.offsetWidth - 6)}px`;
  });
  svg.addEventListener("mouseleave", () => {
    tip.hidden = true;
    cursor.setAttribute("x1", -9);
    cursor.setAttribute("x2", -9);
  });
}
