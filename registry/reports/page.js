// Trees: fold modules, and show only what differs, or names that fit.
for (const part of document.querySelectorAll('.filtered')) {
  const only = part.querySelector('[data-only]');
  const names = part.querySelector('[data-names]');
  const groups = [...part.querySelectorAll('table.tree tbody')];
  const rows = groups.flatMap((group) => [...group.rows].filter((row) => !row.classList.contains('module')));
  const path = (row) => {
    const module = row.parentElement.querySelector('.module code')?.textContent ?? '';
    const name = row.querySelector('code').textContent;
    return module ? `${module}.${name}` : name;
  };
  const fits = (name, wanted) => {
    if (!wanted) return true;
    if (!/[*?]/.test(wanted)) return name.includes(wanted);
    const pattern = wanted.replace(/[.+^${}()|[\]\\]/g, '\\$&').replace(/\*/g, '.*').replace(/\?/g, '.');
    return new RegExp(`^${pattern}$`).test(name);
  };
  const show = () => {
    let count = 0;
    for (const row of rows) {
      row.hidden = (only.checked && row.classList.contains('same')) || !fits(path(row), names.value.trim());
      count += row.hidden ? 0 : 1;
    }
    for (const group of groups) group.hidden = [...group.rows].every((row) => row.hidden || row.classList.contains('module'));
    part.querySelector('[data-shown]').textContent = `${count} of ${rows.length} tensors`;
  };
  only.addEventListener('change', show);
  names.addEventListener('input', show);
  const isLarge = rows.length > 500;
  for (const group of groups) {
    const head = group.querySelector('.module th');
    if (!head) continue;
    const fold = () => head.setAttribute('aria-expanded', String(!group.classList.toggle('folded')));
    head.tabIndex = 0;
    head.setAttribute('aria-expanded', 'true');
    head.addEventListener('click', fold);
    head.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); fold(); }
    });
    if (isLarge || group.classList.contains('same')) fold();
  }
  show();
}
