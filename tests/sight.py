"""What eyes would stumble over on a page: expressions of JavaScript that list it, and nothing where all is well."""

# Words whose contrast with what is behind them is less than WCAG's AA asks of text.
FAINT = """(() => {
    const parts = colour => {
        const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
        return [r, g, b, a];
    };
    const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const behind = e => {
        const found = parts(getComputedStyle(e).backgroundColor);
        return found[3] > 0 ? found : behind(e.parentElement);
    };
    const words = e => e.getClientRects().length && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    return [...document.querySelectorAll("body *")].filter(words).flatMap(e => {
        const style = getComputedStyle(e);
        const pair = [light(parts(e.closest("svg") ? style.fill : style.color)), light(behind(e))];
        const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        return ratio < 4.5 ? [`${e.tagName}.${e.className} ${ratio.toFixed(1)}: ${e.textContent.slice(0, 30)}`] : [];
    });
})()"""

# Labels of pictures that are small, cut off, or run into each other; and pictures that are.
CROWDED = """[...document.querySelectorAll(".plot svg")].filter(e => e.getClientRects().length).flatMap(svg => {
    const frame = svg.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
    const wrong = frame.right > innerWidth || frame.width < 200 ? [`picture of ${frame.width}`] : [], seen = [];
    for (const text of svg.querySelectorAll("text")) {
        const box = text.getBoundingClientRect(), words = text.textContent;
        const inside = box.left > frame.left - 1 && box.right < frame.right + 1 && box.top > frame.top - 1
            && box.bottom < frame.bottom + 1;
        if (parseFloat(getComputedStyle(text).fontSize) * scale < 11.5) wrong.push("small " + words);
        if (!inside) wrong.push("cut off " + words);
        for (const [other, said] of seen)
            if (box.left < other.right && other.left < box.right && box.top < other.bottom - 3
                && other.top < box.bottom - 3) wrong.push(`${words} on ${said}`);
        seen.push([box, words]);
    }
    return wrong;
})"""

# What is wider than the screen, or can be scrolled sideways, and is not code.
SIDEWAYS = """[...document.querySelectorAll("body *")].filter(e => {
    if (!e.getClientRects().length || e.closest("pre, svg, #lines")) return false;
    const scrolls = /auto|scroll/.test(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1;
    return scrolls || e.getBoundingClientRect().right > innerWidth + 1;
}).map(e => `${e.tagName}#${e.id}.${e.className}`)"""
