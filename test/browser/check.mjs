// Opens a page of allocsnoop view in chromium and uses it as a person does.
// usage: node check.mjs single|compare|big URL SCREENSHOT-DIR
// Prints one JSON object with measurements; a failed check is an exception.
import { strict as assert } from "node:assert";
import { chromium } from "playwright-core";

const [mode, url, shots] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--headless=new"],
});
const context = await browser.newContext({ viewport: { width: 1400, height: 1000 }, colorScheme: "light" });
const complaints = [];
context.on("console", (m) => { if (["error", "warning"].includes(m.type())) complaints.push(`console: ${m.text()}`); });
context.on("weberror", (e) => complaints.push(`error: ${e.error()}`));
const home = new URL(url);
let requests = 0;
context.on("request", (r) => {
  const to = new URL(r.url());
  if (to.protocol !== "data:") requests += 1;
  if (to.protocol !== "data:" && to.host !== home.host) complaints.push(`request to ${r.url()}`);
});

const page = await context.newPage();
if (mode === "big") await page.waitForTimeout(3000); // a browser that has just been started still loads pages of its own
const began = Date.now();
await page.goto(url, { waitUntil: "commit" });
await page.waitForSelector("html[data-ready]");
const result = { mode, opened_ms: Date.now() - began };
await page.waitForSelector("html[data-whole]"); // the rows beyond what fits a screen

const cells = (table, column) => page.locator(`#${table} tbody tr td:nth-child(${column})`).allTextContents();
const box = (name) => page.locator("#boxes .box", { hasText: name }).first();
const widthOf = async (name) => (await box(name).boundingBox()).width;

async function sorting() {
  const before = await cells("stacks", 6);
  await page.click("#stacks th:nth-child(6) button");
  const names = await cells("stacks", 6);
  assert.deepEqual(names, [...names].sort(), "rows do not sort by name");
  assert.equal(await page.getAttribute("#stacks th:nth-child(6)", "aria-sort"), "ascending");
  await page.click("#stacks th:nth-child(6) button");
  assert.deepEqual(await cells("stacks", 6), [...names].sort().reverse(), "a second click does not turn the order");
  await page.click("#stacks th:nth-child(1) button");
  assert.equal((await cells("stacks", 6))[0], before[0], "most bytes in use is not first");
}

async function zooming() {
  const whole = await widthOf("all"), narrow = await widthOf("ngx_http_lua_run_thread");
  assert(narrow < whole - 20, "the box to zoom into is as wide as the whole");
  await box("ngx_http_lua_run_thread").click();
  assert(Math.abs(await widthOf("ngx_http_lua_run_thread") - whole) < 3, "the zoomed box is not as wide as the graph");
  assert.match(await page.textContent("#flame-info"), /ngx_http_lua_run_thread/);
  await page.keyboard.press("ArrowDown");
  assert.match(await page.evaluate(() => document.activeElement.textContent), /lj_vm_ffi_call/, "ArrowDown does not go to the largest callee");
  await page.keyboard.press("ArrowUp");
  assert.match(await page.evaluate(() => document.activeElement.textContent), /ngx_http_lua_run_thread/);
  await page.keyboard.press("Escape");
  assert(Math.abs(await widthOf("ngx_http_lua_run_thread") - narrow) < 3, "Escape does not zoom out");
  await page.selectOption("#figure", "0");
  assert(await widthOf("ngx_palloc") > 3 * narrow / 5, "the figure does not change the widths");
  await page.selectOption("#figure", "3");
}

async function finding() {
  await page.fill("#find", "session_new");
  assert((await cells("stacks", 6)).every((t) => t.includes("session_new")), "rows are not filtered");
  assert.match(await page.textContent("#found"), /boxes/);
  assert(await page.locator("#boxes .box.faded").count() > 0, "what was not looked for is not faded");
  await page.fill("#find", "");
}

async function dialog() {
  await page.locator("#verdict tbody tr").first().focus();
  await page.keyboard.press("Enter");
  assert.match(await page.textContent("#detail"), /session_new/, "Enter does not open the stack");
  await page.keyboard.press("Escape");
  assert.equal(await page.locator("#detail[open]").count(), 0, "Escape does not close the stack");
}

// Every control has a name, every table header says what it sorts.
async function accessible() {
  const nameless = await page.evaluate(() => [...document.querySelectorAll("button, input, select, a[href], svg")]
    .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML.slice(0, 90)));
  assert.deepEqual(nameless, [], "controls without a name");
  const tables = await page.evaluate(() => [...document.querySelectorAll("table")].map((t) => document.getElementById(t.getAttribute("aria-labelledby"))?.textContent || ""));
  assert(tables.length >= 3 && tables.every(Boolean), `tables without a name: ${tables}`);
  // From the top of the page on, Tab reaches what there is to do, and shows where it is.
  await page.evaluate(() => { document.activeElement.blur(); scrollTo(0, 0); });
  const reached = new Set();
  for (let i = 0; i < 200 && reached.size < 5; i++) {
    await page.keyboard.press("Tab");
    const at = await page.evaluate(() => {
      const e = document.activeElement;
      const visible = e === document.body || e.matches(".skip") || getComputedStyle(e).outlineStyle !== "none";
      return { what: e.matches(".skip") ? "skip link" : e.matches("th button") ? "sort" : e.matches("tr") ? "row" : e.matches(".box") ? "box" : e.id || "other", visible };
    });
    assert(at.visible, `no outline around the focused ${at.what}`);
    if (["skip link", "find", "sort", "row", "box"].includes(at.what)) reached.add(at.what);
  }
  assert.equal(reached.size, 5, `Tab reaches only ${[...reached]}`);
  await page.evaluate(() => { document.activeElement.blur(); scrollTo(0, 0); });
}

// On a telephone the page does not become wider than the screen; wide tables scroll by themselves.
async function narrow(name) {
  await page.setViewportSize({ width: 390, height: 844 });
  await page.waitForTimeout(300); // the flame graph is drawn anew some time after the last change of size
  const width = await page.evaluate(() => document.documentElement.scrollWidth);
  assert(width <= 390, `the page is ${width} pixels wide on a screen of 390`);
  await page.screenshot({ path: `${shots}/${name}-narrow.png`, fullPage: true });
  await page.setViewportSize({ width: 1400, height: 1000 });
}

async function pprofViews() {
  for (const view of ["flamegraph", "top", "peek?f=session_new", "source?f=session_new"]) {
    const other = await context.newPage();
    const response = await other.goto(url + "pprof/" + view);
    assert.equal(response.status(), 200, `pprof's ${view}`);
    await other.waitForFunction(() => /session_new|No source information/i.test(document.body.textContent));
    if (view === "flamegraph") await other.screenshot({ path: `${shots}/pprof-flamegraph.png` });
    await other.close();
  }
}

// Whatever the profile says stays text, in every place and after every click.
async function hostile() {
  const harmless = async (p, where) => {
    assert.equal(await p.evaluate(() => window.owned), undefined, `${where}: a name of the profile ran`);
    assert.equal(await p.locator("img, b, i, svg[onload], [onerror], [onclick]").count(), 0, `${where}: a name of the profile became markup`);
  };
  await harmless(page, "page");
  assert.match(await page.textContent("#title"), /<script>|<b onclick/, "the hostile name does not show as text");
  assert(await page.locator("main", { hasText: "<script>window.owned=1</script>" }).count() > 0, "the hostile function does not show as text");
  await page.locator("#verdict tbody tr").first().click();
  await harmless(page, "call stack");
  await page.keyboard.press("Escape");
  await page.locator("#boxes .box").nth(2).click();
  await page.fill("#find", "<script>");
  await harmless(page, "flame graph");
  if (home.protocol !== "http:") return;
  for (const view of ["flamegraph", "top", "peek?f=."]) {
    const other = await context.newPage();
    await other.goto(url + "pprof/" + view);
    assert.equal(await other.evaluate(() => window.owned), undefined, `pprof's ${view}: a name of the profile ran`);
    await other.close();
  }
}

async function screenshots(name) {
  await page.screenshot({ path: `${shots}/${name}.png`, fullPage: true });
  await page.emulateMedia({ colorScheme: "dark" });
  await page.screenshot({ path: `${shots}/${name}-dark.png`, fullPage: true });
  await page.emulateMedia({ colorScheme: "light" });
}

if (mode === "single") {
  assert.equal((await cells("verdict", 1))[0], "leaking");
  assert.match((await cells("verdict", 2))[0], /session_new/);
  assert(await page.locator("#chart path").count() > 0, "no curve in the chart");
  await sorting();
  await zooming();
  await finding();
  await dialog();
  await accessible();
  await page.mouse.move(0, 0);
  await screenshots("view");
  await narrow("view");
  if (home.protocol === "http:") await pprofViews();
} else if (mode === "compare") {
  assert.match((await cells("changes", 5))[0], /session_new/);
  assert.match((await cells("changes", 1))[0], /^-/);
  assert.match((await cells("libraries", 2))[0], /another build/);
  assert.match(await page.textContent("#facts"), /another build of libenc\.so: 01d001d001d0 → beefbeefbeef/);
  const hue = async (name) => {
    const [r, , b] = (await box(name).evaluate((e) => getComputedStyle(e).backgroundColor)).match(/\d+/g).map(Number);
    return r > b + 20 ? "red" : b > r + 20 ? "blue" : "grey";
  };
  assert.equal(await hue("session_new"), "blue", "what is gone is not blue");
  assert.equal(await hue("table_grow"), "red", "what is new is not red");
  await accessible();
  await screenshots("compare");
  await narrow("compare");
} else if (mode === "hostile") {
  await hostile();
} else {
  assert(await page.locator("#boxes .box").count() > 100, "a large profile has a small flame graph");
  const wide = await page.locator("#boxes .box").evaluateAll((all) => all.map((e) => e.offsetWidth).findLastIndex((w) => w >= 20));
  await page.locator("#boxes .box").nth(wide).click();
  result.boxes = await page.locator("#boxes .box").count();
  result.requests = requests;
  result.bytes = await page.evaluate(() => performance.getEntriesByType("navigation")[0].decodedBodySize);
}
await browser.close();
assert.deepEqual(complaints, [], "the browser complained, or something was fetched");
console.log(JSON.stringify(result));
