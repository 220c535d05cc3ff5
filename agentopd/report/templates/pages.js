// One page at a time, named by the address; without scripts they stand below one another.
{
  const sections = [...document.querySelectorAll("main > section")];
  const links = [...document.querySelectorAll("nav a")];
  const name = document.title;
  const open = () => {
    const wanted = location.hash.slice(1).split("/")[0];
    const current = sections.find((section) => section.id === wanted) ?? sections[0];
    if (current.classList.contains("current")) return;
    for (const section of sections) section.classList.toggle("current", section === current);
    for (const link of links) {
      if (link.hash === "#" + current.id) {
        link.setAttribute("aria-current", "page");
        document.title = link.textContent + " · " + name;
        link.parentElement.scrollLeft = link.offsetLeft - link.parentElement.offsetLeft - 40;
      } else link.removeAttribute("aria-current");
    }
    hideTip();
    scrollTo(0, 0);
    document.dispatchEvent(new CustomEvent("page", { detail: current.id }));
  };
  document.documentElement.classList.add("paged");
  addEventListener("hashchange", open);
  addEventListener("DOMContentLoaded", open);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    const link = links[event.key - 1];
    if (!link) return;
    location.hash = link.hash;
    open(); // hashchange comes a task later, after the next key perhaps
  });

  const theme = document.getElementById("theme");
  const schemes = [["system", "light dark"], ["light", "light"], ["dark", "dark"]];
  let scheme = 0;
  theme.hidden = false;
  theme.addEventListener("click", () => {
    scheme = (scheme + 1) % schemes.length;
    document.documentElement.style.colorScheme = schemes[scheme][1];
    theme.textContent = "Theme: " + schemes[scheme][0];
  });
}
