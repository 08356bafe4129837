// Tables with check boxes: show the rows whose first column is checked, and only those that differ if that is asked.
for (const part of document.querySelectorAll('.filtered')) {
  const boxes = [...part.querySelectorAll('input[data-status]')];
  const only = part.querySelector('input[data-only]');
  const rows = [...part.querySelectorAll('tr[data-status]')];
  const show = () => {
    const checked = new Set(boxes.filter((box) => box.checked).map((box) => box.dataset.status));
    let count = 0;
    for (const row of rows) {
      row.hidden = !checked.has(row.dataset.status) || (only.checked && row.dataset.same === 'yes');
      count += row.hidden ? 0 : 1;
    }
    part.querySelector('[data-shown]').textContent = `${count} of ${rows.length} tensors shown`;
  };
  for (const box of [...boxes, only]) box.addEventListener('change', show);
  show();
}
