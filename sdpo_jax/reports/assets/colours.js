// Red to neutral to blue, which eyes that confuse red and green tell apart, too. The neutral colour
// is near the page's, so that tokens without a signal recede.
const STOPS = {
  light: { neutral: [255, 255, 255], red: [[244, 165, 130], [178, 24, 43]], blue: [[146, 197, 222], [33, 102, 172]] },
  dark: { neutral: [29, 36, 44], red: [[131, 47, 52], [255, 107, 94]], blue: [[38, 86, 138], [109, 179, 255]] },
};

function mix(a, b, share) {
  return a.map((x, i) => Math.round(x + (b[i] - x) * share));
}

// share: from -1, full red, to 1, full blue.
function colour(share) {
  const { neutral, red, blue } = STOPS[isDark() ? "dark" : "light"];
  const [middle, end] = share < 0 ? red : blue;
  const size = Math.min(1, Math.abs(share));
  return size < 0.5 ? mix(neutral, middle, 2 * size) : mix(middle, end, 2 * size - 1);
}

function css(rgb) {
  return `rgb(${rgb.join(",")})`;
}

// Black or white, whichever is easier to read there: relative luminance as in WCAG 2.
function ink(rgb) {
  const [r, g, b] = rgb.map((x) => (x / 255 <= 0.04045 ? x / 3294.6 : ((x / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}

function gradient() {
  const steps = Array.from({ length: 21 }, (_, i) => css(colour(i / 10 - 1)));
  return `linear-gradient(to right, ${steps.join(",")})`;
}
