// One slider: what is still read after layer k. Without scripts the page shows the shading alone.
for (const bar of document.querySelectorAll(".layers")) {
  const slider = bar.querySelector("input");
  const said = bar.querySelector("output");
  const runs = [...document.querySelectorAll(".run")].map((node) => ({
    node,
    map: node.closest(".map"),
    left: Number(node.closest(".map").dataset.left || Infinity),
    dropped: Number(node.dataset.dropped || Infinity),
    count: Number(node.dataset.count),
  }));
  const total = runs.reduce((sum, run) => sum + run.count, 0);
  const show = () => {
    const layer = Number(slider.value);
    let left = 0;
    for (const run of runs) {
      const gone = run.dropped <= layer;
      run.node.classList.toggle("gone", gone);
      run.map.classList.toggle("left", run.left <= layer);
      if (!gone && run.left > layer) left += run.count;
    }
    const share = total ? Math.round((100 * left) / total) : 100;
    said.textContent = layer
      ? `After layer ${layer}: ${share}% of the tokens are still read`
      : "Before the first layer: every token is read";
  };
  slider.addEventListener("input", show);
  bar.hidden = false;
  show();
}
