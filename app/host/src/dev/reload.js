// Reloads the page when a new build runs, and shows the messages of the compiler when there is none.
(() => {
  const build = Number(document.currentScript.dataset.build);
  let panel;

  function show(text) {
    panel ??= document.body.appendChild(document.createElement("pre"));
    panel.id = "perennial-dev";
    panel.setAttribute("role", "alert");
    panel.textContent = text;
    // Styles that a script sets are allowed by a policy that forbids those of the page.
    Object.assign(panel.style, {
      position: "fixed", inset: "0", margin: "0", padding: "1.5rem", overflow: "auto", zIndex: "2147483647",
      background: "#1b1b1f", color: "#f2f2f2", font: "14px/1.5 ui-monospace, monospace", whiteSpace: "pre-wrap",
    });
  }

  new EventSource("/_dev/events").onmessage = ({ data }) => {
    const state = JSON.parse(data);
    if (state.stage === "running" && state.build !== build) location.reload();
    else if (state.stage === "failed") show(state.messages);
    else if (state.stage === "running") panel?.remove();
  };
})();
