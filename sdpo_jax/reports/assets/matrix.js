// The batch as a picture: rows are responses, columns are positions.
const GUTTER = 18;

class Matrix {
  // value(row, i): share from -1 to 1, or null where there is no signal.
  constructor(canvas, value, pick, hover) {
    this.canvas = canvas;
    this.cells = document.createElement("canvas");
    this.value = value;
    this.rows = [];
    canvas.addEventListener("click", (event) => {
      const place = this.place(event);
      if (place) pick(place.row, place.i);
    });
    canvas.addEventListener("mousemove", (event) => hover(this.place(event)));
    canvas.addEventListener("mouseleave", () => hover(null));
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = this.rows[Math.floor((event.clientY - box.top) / this.height)];
    const i = Math.floor((event.clientX - box.left - GUTTER) / this.cell);
    return row && i < row.w.length ? { row, i: Math.max(0, i) } : null;
  }

  // The cells, on a picture of their own: a mark that moves would otherwise draw them all again.
  draw(rows) {
    this.rows = rows;
    const columns = Math.max(1, ...rows.map((row) => row.w.length));
    this.width = this.canvas.parentElement.clientWidth;
    this.ratio = window.devicePixelRatio || 1;
    this.height = Math.min(16, Math.max(4, Math.floor(640 / Math.max(1, rows.length))));
    this.cell = (this.width - GUTTER) / columns;
    const tall = this.height * Math.max(1, rows.length);
    this.canvas.style.height = `${tall}px`;
    for (const canvas of [this.canvas, this.cells]) {
      canvas.width = Math.round(this.width * this.ratio);
      canvas.height = Math.round(tall * this.ratio);
      canvas.getContext("2d").scale(this.ratio, this.ratio);
    }
    const pen = this.cells.getContext("2d");
    rows.forEach((row, y) => this.drawRow(pen, row, y * this.height));
  }

  drawRow(pen, row, top) {
    const style = getComputedStyle(document.documentElement);
    const gap = this.height > 6 ? 1 : 0;
    const step = Math.max(1, Math.ceil(1 / this.cell)); // tokens that share a column of pixels
    for (let i = 0; i < row.w.length; i += step) {
      const share = this.strongest(row, i, step);
      const left = Math.round(GUTTER + i * this.cell);
      const right = Math.max(left + 1, Math.round(GUTTER + (i + step) * this.cell));
      if (share === null) {
        pen.fillStyle = style.getPropertyValue("--line");
        pen.fillRect(left, top + this.height / 2 - 0.5, Math.max(1, (right - left) / 2), 1);
      } else {
        pen.fillStyle = css(colour(share));
        pen.fillRect(left, top, right - left, this.height - gap);
      }
    }
    const size = Math.min(3, this.height / 2 - 1);
    pen.strokeStyle = pen.fillStyle = style.getPropertyValue(row.verdict === "passed" ? "--good" : "--bad");
    pen.beginPath();
    pen.arc(7, top + this.height / 2, size, 0, 2 * Math.PI);
    if (row.verdict === "passed") pen.fill();
    else pen.stroke();
  }

  strongest(row, i, count) {
    let best = this.value(row, i);
    for (let j = i + 1; j < Math.min(i + count, row.w.length); j++) {
      const share = this.value(row, j);
      if (share !== null && Math.abs(share) > Math.abs(best)) best = share;
    }
    return best;
  }

  // Lines between prompts, where siblings stand together, and a frame around what is chosen.
  mark(chosen, token, grouped) {
    if (this.cells.width === 0) return; // a window without room has nothing to copy
    const style = getComputedStyle(document.documentElement);
    const pen = this.canvas.getContext("2d");
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    pen.drawImage(this.cells, 0, 0, this.cells.width / this.ratio, this.cells.height / this.ratio);
    this.rows.forEach((row, y) => {
      const top = y * this.height;
      if (grouped && y > 0 && this.rows[y - 1].ask !== row.ask) {
        pen.fillStyle = style.getPropertyValue("--soft");
        pen.fillRect(0, top - 1, this.width, 1);
      }
      if (row !== chosen) return;
      pen.strokeStyle = style.getPropertyValue("--mark");
      pen.lineWidth = 2;
      pen.strokeRect(1, top, this.width - 2, this.height - 1);
      pen.strokeRect(GUTTER + token * this.cell, top, Math.max(3, this.cell), this.height - 1);
    });
  }
}
