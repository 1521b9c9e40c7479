// The dashboard's pages work without this. With it they follow what happens: the server says over one stream of events
// that there is news, and the page is asked for again and changed where it differs.
"use strict";
(() => {
  const ANSWER_LATER = 5000; // milliseconds until a stream that was refused is tried again
  const OPEN_AGAIN = 5000; // milliseconds in which a stream that ended is open again; later it is told as lost
  const main = document.getElementById("main");
  const button = document.getElementById("live");
  const label = document.getElementById("live-label");
  const connection = document.getElementById("connection");
  document.documentElement.classList.add("js");

  // Not node.id: of a form that is its input with the name "id".
  const keyOf = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("id") || node.getAttribute("data-key") : null);
  const alike = (one, other) => one.nodeType === other.nodeType && one.nodeName === other.nodeName && keyOf(one) === keyOf(other);
  // What the reader has changed, or is about to change, stays.
  const kept = (element, attribute) => element.nodeName === "DETAILS" && attribute === "open";
  const edited = (node) => node === document.activeElement && node.matches("input:not([type=checkbox]), select, textarea");

  function morph(old, fresh) {
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.data !== fresh.data) old.data = fresh.data;
      return;
    }
    if (edited(old)) return;
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value && !kept(old, name)) old.setAttribute(name, value);
    }
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name) && !kept(old, name)) old.removeAttribute(name);
    }
    morphChildren(old, fresh);
  }

  function morphChildren(old, fresh) {
    const keyed = new Map();
    for (const child of old.childNodes) {
      if (keyOf(child)) keyed.set(child.nodeName + keyOf(child), child);
    }
    // What was said of a change stays where it is, though no fresh page says it.
    const past = (node) => (node && node.id === "said" ? node.nextSibling : node);
    let at = past(old.firstChild);
    for (const child of [...fresh.childNodes]) {
      const key = keyOf(child);
      const same = key ? keyed.get(child.nodeName + key) : at && alike(at, child) ? at : null;
      if (same) {
        if (same === at) at = past(at.nextSibling);
        else old.insertBefore(same, at);
        morph(same, child);
      } else {
        old.insertBefore(document.importNode(child, true), at);
      }
    }
    while (at) {
      const next = past(at.nextSibling);
      at.remove();
      at = next;
    }
  }

  function writeClocks(root) {
    const today = new Date().toDateString();
    for (const element of root.querySelectorAll("time[data-clock]")) {
      const moment = new Date(element.dateTime);
      if (Number.isNaN(moment.getTime())) continue;
      element.title = moment.toString();
      const time = moment.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
      element.textContent = moment.toDateString() === today ? time : `${moment.toLocaleDateString()} ${time}`;
    }
  }

  function show(html) {
    const fresh = new DOMParser().parseFromString(html, "text/html");
    const other = fresh.getElementById("main");
    if (!other) return;
    writeClocks(other);
    if (!other.querySelector("#problem")) document.getElementById("problem")?.remove();
    const focused = document.activeElement;
    morph(main, other);
    if (focused && focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
    const count = document.getElementById("dead-count");
    const newCount = fresh.getElementById("dead-count");
    if (count && newCount) morph(count, newCount);
    document.title = fresh.title;
  }

  // What the reader has before them stays, and is said to be old.
  function warn(html) {
    const reason = new DOMParser().parseFromString(html, "text/html").querySelector("#main .reason");
    const told = reason ? reason.textContent.trim().replace(/[.]?$/, ".") : "The dashboard does not answer.";
    const words = `${told} What is shown may be old.`;
    let notice = document.getElementById("problem");
    if (!notice) {
      notice = Object.assign(document.createElement("p"), { id: "problem", className: "notice bad" });
      notice.setAttribute("role", "alert");
      main.prepend(notice);
    }
    if (notice.textContent !== words) notice.textContent = words;
  }

  let busy = false;
  let again = false;
  async function refresh() {
    if (busy) {
      again = true;
      return;
    }
    busy = true;
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (answer.redirected) location.assign(answer.url);
      else if (answer.ok) show(await answer.text());
      else warn(await answer.text());
    } catch {
      // The stream tells of a connection that is lost.
    }
    busy = false;
    if (again) {
      again = false;
      refresh();
    }
  }

  let source = null;
  let wanted = true;
  function tell(state, words) {
    button.dataset.state = state;
    label.textContent = words;
  }

  let late = null;
  function inTime() {
    clearTimeout(late);
    late = null;
  }

  function lose() {
    inTime();
    if (button.dataset.state !== "lost") connection.textContent = "The connection to the dashboard is lost.";
    tell("lost", "Offline");
  }

  function open() {
    if (source || !wanted || document.hidden) return;
    source = new EventSource("events");
    source.onopen = () => {
      inTime();
      if (button.dataset.state === "lost") connection.textContent = "Connected again.";
      tell("live", "Live");
    };
    source.onmessage = refresh;
    source.onerror = () => {
      if (!source) return;
      if (source.readyState !== EventSource.CLOSED) {
        late ??= setTimeout(lose, OPEN_AGAIN);
      } else {
        lose();
        close();
        setTimeout(() => {
          refresh();
          open();
        }, ANSWER_LATER);
      }
    };
  }

  function close() {
    inTime();
    if (source) source.close();
    source = null;
  }

  writeClocks(document);
  for (const box of document.querySelectorAll("#every")) box.checked = false;
  main.addEventListener("change", (event) => {
    if (event.target.id === "every") {
      for (const box of main.querySelectorAll("input[name=id]")) box.checked = event.target.checked;
    }
  });

  const said = document.getElementById("said");
  if (said) {
    said.focus();
    const address = new URL(location.href);
    address.searchParams.delete("said");
    address.searchParams.delete("count");
    history.replaceState(null, "", address);
  }

  if (!button || "still" in main.dataset) {
    if (button) button.hidden = true;
    return;
  }
  button.addEventListener("click", () => {
    wanted = !wanted;
    button.setAttribute("aria-pressed", String(wanted));
    if (wanted) open();
    else {
      close();
      tell("paused", "Paused");
    }
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  tell("live", "Live");
  open();
})();
