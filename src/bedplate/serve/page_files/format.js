// Numbers as text.

const UNITS = ["B", "kB", "MB", "GB", "TB"];

export function size(bytes) {
  let unit = 0;
  while (bytes >= 999.5 && unit < UNITS.length - 1) {
    bytes /= 1000;
    unit++;
  }
  return `${unit && bytes < 99.95 ? bytes.toFixed(1) : Math.round(bytes)} ${UNITS[unit]}`;
}

export const seconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(1)} s`;

export const rate = (value) => (value < 10 ? value.toFixed(1) : `${Math.round(value)}`);

export const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;
