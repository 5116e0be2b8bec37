"use strict";

// Plays all videos of a page as one: the longest leads, the others follow its time. Where videos
// were left out, frames can still be chosen.
function player(root) {
  const videos = [...root.querySelectorAll("video")];
  const find = (name) => root.querySelector(`[data-${name}]`);
  const [play, seek, clock, speed, sound] =
    ["play", "seek", "clock", "speed", "sound-switch"].map(find);
  const times = root.dataset.times ? JSON.parse(root.dataset.times) : [];
  if (videos.length === 0 && times.length === 0) return;
  const curves = [...root.querySelectorAll("[data-values]")]
    .map((output) => ({ output, values: JSON.parse(output.dataset.values) }));
  const lengths = new Map();  // kept while a video is read again
  const length = (video) => {
    if (video.duration) lengths.set(video, video.duration);
    return lengths.get(video) || 0;
  };
  const lead = () => videos.reduce((a, b) => (length(b) > length(a) ? b : a));
  let place = 0;
  const now = () => (videos.length ? lead().currentTime : place);
  const over = (video) => length(video) > 0 && now() >= length(video);
  const whole = () => (videos.length ? length(lead()) : times.at(-1));
  const frameAt = (time) => Math.max(0, times.findLastIndex((begins) => begins <= time + 1e-3));
  let playing = false;

  function go(time) {
    place = time;
    for (const video of videos) video.currentTime = time;
    show();
  }
  function set(on) {
    if (videos.length === 0) return;
    playing = on;
    if (on && lead().ended) go(0);
    for (const video of videos) on && !over(video) ? video.play().catch(() => {}) : video.pause();
    play.textContent = on ? "❚❚" : "▶";
    play.setAttribute("aria-label", on ? "pause" : "play");
    if (on) requestAnimationFrame(follow);
    else go(now());
  }
  function follow() {
    if (!playing) return;
    const first = lead();
    if (first.ended) {
      go(0);
      set(true);
      return;
    }
    for (const video of videos) {
      const apart = Math.abs(video.currentTime - first.currentTime);
      if (apart > 0.08 && !first.seeking && !video.seeking && first.currentTime < length(video))
        video.currentTime = first.currentTime;
    }
    show();
    requestAnimationFrame(follow);
  }
  function show() {
    const [time, end] = [now(), whole()];
    if (document.activeElement !== seek || playing) seek.value = end ? (1000 * time) / end : 0;
    if (times.length === 0) {
      clock.textContent = `${time.toFixed(2)} s`;
      root.style.setProperty("--now", end ? time / end : 0);
      return;
    }
    const frame = frameAt(time);
    clock.textContent = `frame ${frame} · ${times[frame].toFixed(2)} s`;
    root.style.setProperty("--now", frame / Math.max(times.length - 1, 1));
    for (const { output, values } of curves)
      output.textContent = values[frame] === null ? "–" : values[frame].toFixed(1);
  }
  function step(by) {
    set(false);
    const next = Math.max(0, Math.min(times.length - 1, frameAt(now()) + by));
    go(times.length ? times[next] + 1e-4 : Math.max(0, now() + by / 8));
  }

  root.querySelector(".controls").hidden = false;
  play.hidden = speed.hidden = videos.length === 0;
  for (const video of videos) {
    video.controls = false;
    video.muted = true;
    video.addEventListener("loadeddata", show);
    video.addEventListener("seeked", show);
    // some browsers play and seek in blobs only
    fetch(video.src).then((found) => found.blob()).then((blob) => {
      const time = video.currentTime;
      video.src = URL.createObjectURL(blob);
      video.currentTime = time;
      if (playing && !over(video)) video.play().catch(() => {});
    }).catch(() => {});
  }
  play.addEventListener("click", () => set(!playing));
  seek.addEventListener("input", () => {
    const time = (seek.value / 1000) * whole();
    set(false);
    go(time);
  });
  speed.addEventListener("change", () => {
    for (const video of videos) video.defaultPlaybackRate = video.playbackRate = +speed.value;
  });
  const heard = root.querySelector("video[data-sound]");
  if (heard) {
    sound.hidden = false;
    sound.addEventListener("click", () => {
      heard.muted = !heard.muted;
      sound.setAttribute("aria-pressed", String(!heard.muted));
    });
  }
  for (const line of root.querySelectorAll("[data-timeline]")) {
    line.addEventListener("click", (event) => {
      const box = line.getBoundingClientRect();
      const share = line.dataset.timeline === "down"
        ? (event.clientY - box.top) / box.height : (event.clientX - box.left) / box.width;
      const frame = Math.round(Math.max(0, Math.min(1, share)) * (times.length - 1));
      set(false);
      go(times[frame] + 1e-4);
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    // what has the focus keeps its own keys: a button space, a slider and what scrolls the others
    const own = event.key === " " ? "select, button, summary" : "input, select, pre, .scroll";
    if (event.target.matches(own)) return;
    if (event.key === " ") set(!playing);
    else if (event.key === "ArrowRight") step(1);
    else if (event.key === "ArrowLeft") step(-1);
    else return;
    event.preventDefault();
  });
  const row = find("row");
  if (row) {
    const places = JSON.parse(row.dataset.places);
    row.addEventListener("input", () => {
      root.style.setProperty("--row", row.value);
      root.style.setProperty("--at", places[row.value]);
    });
  }
  show();
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) set(true);
}

// A click on a column's header sorts by it, another one the other way. Words come after numbers, and
// what is missing last, both ways.
function sortable(table) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => header.addEventListener("click", () => {
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of headers) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.cells[column];
      return cell.dataset.number === undefined ? cell.textContent : +cell.dataset.number;
    };
    const rank = (value) => (value === "–" ? 2 : typeof value === "number" ? 0 : 1);
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (rank(x) !== rank(y)) return rank(x) - rank(y);
      const by = typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true });
      return up ? by : -by;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  }));
}

document.querySelectorAll("[data-player]").forEach(player);
document.querySelectorAll("[data-sortable]").forEach(sortable);
